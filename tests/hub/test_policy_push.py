"""A policy that was trained goes to the Hub with its card, and no token leaves a trace."""

import json


def test_a_trained_policy_is_pushed(hub, session, tiny_vlm_path, tmp_path):
    rows = [{"prompt": "What is 7 - 3?", "completions": ["7 - 3 = 4.", "The answer is 4."]}] * 2
    (tmp_path / "solutions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["train-policy", "--solutions", tmp_path / "solutions.jsonl", "--model", tiny_vlm_path, "--max_steps", 1]
    args += ["--output_dir", tmp_path / "policy", "--use_cpu", "true", "--report_to", "none", "--save_strategy", "no"]
    args += ["--push_to_hub", "true", "--hub_model_id", "me/tiny-policy", "--hub_token", "hf_writes_secret"]
    answer = session.ask(args=list(map(str, args)))
    assert answer["status"] == 0, answer["err"]
    loaded = session.run(
        "from huggingface_hub import ModelCard, list_repo_files\n"
        "from mm_prm.policies.transformers import TransformersPolicy\n"
        "policy = TransformersPolicy.from_pretrained('me/tiny-policy', step_format='tags')\n"
        "card = ModelCard.load('me/tiny-policy')\n"
        "result = [sorted(list_repo_files('me/tiny-policy')), card.data.tags, card.text]"
    )
    files, tags, text = loaded
    assert {"README.md", "config.json", "model.safetensors", "settings.yaml", "tokenizer.json"} <= set(files)
    assert "policy" in tags and "mm-prm" in tags
    assert 'TransformersPolicy.from_pretrained("me/tiny-policy", step_format="tags")' in text
    for file in (tmp_path / "policy").iterdir():
        assert b"hf_writes_secret" not in file.read_bytes(), file.name
