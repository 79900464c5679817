"""Released InternVLChat checkpoints become transformers' own: same logits, same ids, same tiles, or an error and nothing."""

import itertools
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from mm_prm.cli import main
from mm_prm.models import AutoModelForProcessReward, ProcessRewardProcessor, create_process_reward_model
from mm_prm.models.convert_internvl_chat import convert_internvl_chat
from mm_prm.models.convert_internvl_config import Released, image_processors

RELEASED = Path(__file__).parents[3] / "shared" / "data" / "internvlchat_tiny"
IMAGE_TOKEN = 500  # of the recorded inputs
ADDED = ["<IMG_CONTEXT>", "<img>", "</img>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<prm>"]
KINDS = ("internlm2", "qwen2")

_TEXT = (
    "the area of a triangle is half its base times height so we add subtract angle sum equals degrees Question Yes No "
    "therefore answer x y z \\frac{3}{4} \\sqrt{2} $a^2+b^2$ 0 1 2 3 42 3.14 1,000 (A) [B] 三角形 面积 等于 é naïve"
)
_WORDS = _TEXT.split()


@pytest.fixture
def released(tmp_path):
    """Function that copies a released checkpoint, to be changed."""
    if not RELEASED.is_dir():
        pytest.skip(f"the released checkpoints are not at {RELEASED}")

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(RELEASED / kind, tmp_path / f"released_{kind}"))

    return copy


def _sentences(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(3, 12))) for _ in range(count)]


def _strings(count: int = 1000) -> list[str]:
    """Texts of all sorts: sentences, layouts of white space, scripts and signs that no vocabulary has."""
    draw = random.Random(1)
    pieces = [
        *_WORDS,
        " ",
        "  ",
        "    ",
        "\n",
        "\n\n",
        "\t",
        "▁",
        "🙂",
        "ß",
        "日本",
        "Ω≥",
        "'s",
        "I'll",
        "e\u0301",
        "ﬁ",
        "...",
        "<",
        "|>",
    ]
    strings = ["", " ", "   ", "\n", "Yes", "No", " Yes", *_sentences(200, seed=2)]
    while len(strings) < count:
        glue = draw.choice(["", " ", "  "])
        strings.append(glue.join(draw.choices(pieces, k=draw.randint(1, 15))))
    return strings


def _write_tokenizer_config(folder: Path, added: dict[int, str], **settings) -> None:
    described = {
        str(token_id): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for token_id, content in added.items()
    }
    content = {**settings, "added_tokens_decoder": described}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")


def _add_sentencepiece(folder: Path, **options):
    """Give a checkpoint a SentencePiece tokenizer of 500 pieces and the added tokens behind it; returns the reference."""
    sentencepiece = pytest.importorskip("sentencepiece")
    settings = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        **options,
    }
    with (folder / "tokenizer.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(_sentences(2000, seed=0) + ["Yes", "No"] * 200),
            model_writer=model,
            model_type="bpe",
            vocab_size=500,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            # Set aside for added tokens, as `[UNUSED_TOKEN_145]` is in InternLM2's
            control_symbols=["[UNUSED_TOKEN_0]", "[UNUSED_TOKEN_1]"],
            minloglevel=2,
            **settings,
        )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert reference.vocab_size() == 500 == IMAGE_TOKEN
    added = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "<|im_end|>", 4: "<|im_start|>"}
    fillers = [f"<|filler_{number}|>" for number in range(512 - 500 - len(ADDED))]
    added |= dict(enumerate(ADDED + fillers, start=500))
    _write_tokenizer_config(
        folder, added, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>", add_bos_token=True
    )
    return reference


# The encoding of Qwen2 as its paper's program has it, character by character.
_QWEN2_SPLIT = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_signs() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _add_byte_level(folder: Path):
    """Give a checkpoint Qwen2's two files; returns the reference: text to ids."""
    import unicodedata

    signs = _byte_signs()

    def words(text: str) -> list[list[str]]:
        found = _QWEN2_SPLIT.findall(unicodedata.normalize("NFC", text))
        return [[signs[byte] for byte in word.encode()] for word in found]

    def merged(word: list[str], pair: tuple[str, str]) -> list[str]:
        out: list[str] = []
        for sign in word:
            if out and (out[-1], sign) == pair:
                out[-1] += sign
            else:
                out.append(sign)
        return out

    vocabulary = list(signs)
    merges: list[tuple[str, str]] = []
    corpus = [word for text in ["Yes", "No"] * 300 + _sentences(150, seed=0) for word in words(text)]
    while len(vocabulary) < 330:
        counts: dict[tuple[str, str], int] = {}
        for word in corpus:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        if "".join(best) not in vocabulary:
            vocabulary.append("".join(best))
        corpus = [merged(word, best) for word in corpus]
    ids = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *ADDED]
    _write_tokenizer_config(
        folder, dict(enumerate(names, start=330)), eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=None
    )

    def encode(text: str) -> list[int]:
        out = []
        for word in words(text):
            for pair in merges:
                word = merged(word, pair)
            out += [ids[sign] for sign in word]
        return out

    return encode


def _add_tokenizer(kind: str, folder: Path):
    return _add_sentencepiece(folder).encode if kind == "internlm2" else _add_byte_level(folder)


def _edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    file.write_text(json.dumps(config), encoding="utf-8")


def _edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _logits(folder: Path, kind: str, model_class=AutoModelForImageTextToText) -> tuple[torch.Tensor, torch.Tensor]:
    reference = load_file(RELEASED / kind / "reference.safetensors")
    model = model_class.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(input_ids=reference["input_ids"], pixel_values=reference["pixel_values"])
    return outputs.logits, reference["logits"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_tokenizer(kind, released, tmp_path, caplog):
    convert_internvl_chat(released(kind), tmp_path / "out", image_token_id=IMAGE_TOKEN)
    assert "no tokenizer files" in caplog.text
    logits, expected = _logits(tmp_path / "out", kind)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["InternVLForConditionalGeneration"]
    assert config["text_config"]["model_type"] == {"internlm2": "llama", "qwen2": "qwen2"}[kind]
    assert "auto_map" not in config
    assert (config["image_seq_length"], config["image_token_id"], config["dtype"]) == (4, IMAGE_TOKEN, "float32")

    # As a process reward model: the same hidden states times two rows of the head.
    model = AutoModelForProcessReward.from_pretrained(tmp_path / "out", reward_token_ids=[7, 3])
    inputs = load_file(RELEASED / kind / "reference.safetensors")
    with torch.no_grad():
        outputs = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    torch.testing.assert_close(outputs.logits, expected[..., [7, 3]], atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_with_tokenizer(kind, released, tmp_path):
    source, out = released(kind), tmp_path / "out"
    encode = _add_tokenizer(kind, source)
    if kind == "qwen2":
        with pytest.raises(ValueError, match=r"the tokenizer of .* has <IMG_CONTEXT> as token 333"):
            convert_internvl_chat(source, out, image_token_id=IMAGE_TOKEN)
    convert_internvl_chat(source, out)

    processor = AutoProcessor.from_pretrained(out)
    assert isinstance(processor, InternVLProcessor)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.is_fast
    strings = _strings()
    assert len(strings) == 1000
    for text in strings:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == encode(text), repr(text)
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids

    if kind == "internlm2":
        # The recorded inputs have the image token that this tokenizer has, and `<video>` has got a row.
        logits, expected = _logits(out, kind)
        assert logits.shape[-1] == 513
        torch.testing.assert_close(logits[..., :512], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[..., 512], expected.mean(dim=-1), atol=1e-4, rtol=0)
        assert tokenizer("Yes")["input_ids"] == [1, *encode("Yes")]
        assert tokenizer.decode(encode("naïve 🙂  x")) == "naïve 🙂  x"
    text = "<|im_start|>user\n Yes  x<|im_end|><IMG_CONTEXT>No<prm>"
    vocabulary = tokenizer.get_vocab()
    expected_ids = []
    for piece in regex.split(r"(<\|?[a-zA-Z_]+\|?>)", text):
        expected_ids += [vocabulary[piece]] if piece in vocabulary and piece.startswith("<") else encode(piece)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected_ids
    end = vocabulary["<|im_end|>"]
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert model.generation_config.eos_token_id[0] == end
    assert len(tokenizer) <= model.get_input_embeddings().weight.shape[0]


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True, "remove_extra_whitespaces": True},
        {"add_dummy_prefix": True, "byte_fallback": False, "split_by_whitespace": False},
        {"user_defined_symbols": ["<keep>", "==>"]},
    ],
    ids=["usual", "no_bytes", "user_defined"],
)
def test_other_sentencepiece_models(options, released, tmp_path):
    source = released("internlm2")
    reference = _add_sentencepiece(source, **options)
    convert_internvl_chat(source, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*_strings(), "a<keep>b  ==> c", "<keep><keep> ==>"]:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text), repr(text)


def test_qwen2_fast_file(released, tmp_path):
    """A source may have a fast tokenizer already, beside added tokens in the older file of their own."""
    source = released("qwen2")
    encode = _add_byte_level(source)
    convert_internvl_chat(source, tmp_path / "first")
    shutil.copy(tmp_path / "first" / "tokenizer.json", source)
    for name in ("vocab.json", "merges.txt"):
        (source / name).unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {token["content"]: int(number) for number, token in settings.pop("added_tokens_decoder").items()}
    (source / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (source / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    convert_internvl_chat(source, tmp_path / "second")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "second")
    for text in _strings(100):
        assert tokenizer(text)["input_ids"] == encode(text), repr(text)


SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"


def test_chat_template_and_scores(released, tmp_path):
    source, out = released("internlm2"), tmp_path / "out"
    _add_sentencepiece(source)
    convert_internvl_chat(source, out)
    processor = AutoProcessor.from_pretrained(out)

    def render(content, **kwargs):
        messages = [{"role": "user", "content": content}]
        return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)

    opening = f"<s><|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    closing = "<|im_end|>\n<|im_start|>assistant\n"
    image, text = {"type": "image"}, {"type": "text", "text": "How many?"}
    assert render("How many?") == f"{opening}How many?{closing}"
    assert render([image, text]) == f"{opening}<IMG_CONTEXT>\nHow many?{closing}"
    assert render([text, image, text]) == f"{opening}How many?<IMG_CONTEXT>How many?{closing}"
    written_out = {"type": "text", "text": "\nHow many?"}
    assert render([image, written_out]) == f"{opening}<IMG_CONTEXT>\nHow many?{closing}"
    spoken = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    expected = "<s><|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert processor.apply_chat_template(spoken, tokenize=False) == expected

    # 2 tiles and the thumbnail, 4 tokens each
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8))
    inputs = processor(text=render([image, text]), images=[picture], add_special_tokens=False, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 56, 56)
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 12
    assert (inputs["input_ids"] == 1).sum() == 1

    model, reward_processor = create_process_reward_model(out)
    assert reward_processor.added_token_ids == ()
    assert reward_processor.step_token_id == IMAGE_TOKEN + ADDED.index("<prm>")
    batch = reward_processor([{"question": "How many?", "images": [picture]}], [["One and one.", "The answer is 2."]])
    scores = model(**batch).logits[batch["step_mask"]].softmax(dim=-1)[:, 1]
    assert scores.shape == (2,) and bool(((scores > 0) & (scores < 1)).all())


@pytest.mark.parametrize("kind", ["internlm2", "qwen2"])
def test_a_released_prm_reads_the_text_it_was_evaluated_with(kind, released, tmp_path):
    source, out = released(kind), tmp_path / "out"
    _add_tokenizer(kind, source)
    convert_internvl_chat(source, out)
    processor = ProcessRewardProcessor.from_pretrained(out)
    assert processor.template_style == "mm_prm"
    problem = {"question": "How many?", "images": [Image.new("RGB", (56, 56), "white")]}
    steps = ["One and one.", "The answer is 2."]
    opening = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<|im_start|>assistant\n"
    process = "Question: How many?\nProcess: One and one.<prm>The answer is 2.<prm><|im_end|>\n"
    bos = "<s>" if kind == "internlm2" else ""
    assert processor.text(problem, steps) == f"{bos}{opening}<IMG_CONTEXT>\n{process}"
    batch = processor([problem], [steps])
    # InternLM2's tokenizer puts <s> there by itself, as it did for the ancestor
    picture = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>"
    assert (
        batch["input_ids"][0].tolist()
        == AutoTokenizer.from_pretrained(out)(f"{opening}{picture}\n{process}")["input_ids"]
    )
    model = AutoModelForProcessReward.from_pretrained(out).eval()
    assert model.config.step_token_id == processor.step_token_id
    assert model(**batch).logits[batch["step_mask"]].shape == (2, 2)


def _tiles_of_the_ancestor(image: Image.Image, size: int, max_num: int) -> list[Image.Image]:
    """Dynamic tiling by its definition: the closest aspect ratio; of equally close grids the larger, if it pays off."""
    width, height = image.size
    grids = [(columns, rows) for columns in range(1, max_num + 1) for rows in range(1, max_num + 1)]
    grids = sorted((grid for grid in grids if grid[0] * grid[1] <= max_num), key=lambda grid: grid[0] * grid[1])
    closest, chosen = float("inf"), (1, 1)
    for columns, rows in grids:
        distance = abs(width / height - columns / rows)
        if distance < closest:
            closest, chosen = distance, (columns, rows)
        elif distance == closest and width * height > 0.5 * size * size * columns * rows:
            chosen = (columns, rows)
    columns, rows = chosen
    whole = image.resize((size * columns, size * rows), Image.Resampling.BICUBIC)
    corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
    tiles = [whole.crop((left, top, left + size, top + size)) for left, top in corners]
    return [*tiles, image.resize((size, size), Image.Resampling.BICUBIC)] if len(tiles) > 1 else tiles


def _released_images(size: int, **changes) -> Released:
    values = {
        "force_image_size": size,
        "dynamic_image_size": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        **changes,
    }
    return Released(Path("config.json"), values)


def test_tiles_are_those_of_the_ancestor(tmp_path):
    draw = np.random.default_rng(0)
    sizes = [tuple(draw.integers(10, 150, size=2)) for _ in range(60)]
    # Squares and other ratios that grids of several sizes have, on both sides of the rule about the area; long strips
    sizes += [(28, 28), (56, 56), (57, 57), (40, 20), (80, 40), (79, 40), (20, 40), (60, 120), (200, 10), (10, 200)]
    cases = [(28, size) for size in sizes] + [(448, (640, 480)), (448, (500, 1000))]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    processors = {}
    for tile in (28, 448):
        default, _ = image_processors(_released_images(tile))
        default.save_pretrained(tmp_path / str(tile))
        processors[tile] = (default, GotOcr2ImageProcessorPil.from_pretrained(tmp_path / str(tile)))
    seen, errors = set(), []
    for tile, (width, height) in cases:
        image = Image.fromarray(draw.integers(0, 256, (int(height), int(width), 3), dtype=np.uint8))
        expected = np.stack([np.asarray(part, dtype=float) for part in _tiles_of_the_ancestor(image, tile, 6)])
        seen.add(len(expected))
        default, exact = processors[tile]
        for processor in (default, exact):
            found = processor([image], return_tensors="pt")
            assert found["num_patches"].tolist() == [len(expected)], (width, height)
            grey = (found["pixel_values"].permute(0, 2, 3, 1).numpy() * std + mean) * 255
            error = np.abs(grey - expected)
            if processor is exact:
                assert error.max() < 1e-3, (width, height)
            else:
                errors.append(error.mean())
    # torchvision, with which transformers resizes unless told otherwise, rounds differently here and there
    assert np.mean(errors) < 0.1 and max(errors) < 1
    assert seen == {1, 3, 4, 5, 6, 7}


def test_without_dynamic_tiling_there_is_one_tile():
    processor, _ = image_processors(_released_images(28, dynamic_image_size=False))
    image = Image.new("RGB", (100, 30))
    assert processor([image], return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)


def _shard(source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for number, keys in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({key: weights[key] for key in keys}, source / file)
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_sharded_source_and_dtype(released, tmp_path):
    source = released("internlm2")
    convert_internvl_chat(source, tmp_path / "single", image_token_id=IMAGE_TOKEN)
    _shard(source)
    convert_internvl_chat(source, tmp_path / "out", image_token_id=IMAGE_TOKEN)
    single, sharded = (load_file(tmp_path / name / "model.safetensors") for name in ("single", "out"))
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[key], sharded[key]) for key in single)

    for file in source.glob("model-*.safetensors"):
        save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    convert_internvl_chat(source, tmp_path / "half", image_token_id=IMAGE_TOKEN)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16


def test_large_models_are_written_in_shards(released, tmp_path, monkeypatch):
    save = InternVLForConditionalGeneration.save_pretrained
    monkeypatch.setattr(
        InternVLForConditionalGeneration,
        "save_pretrained",
        lambda model, folder, max_shard_size: save(model, folder, max_shard_size="300KB"),
    )
    convert_internvl_chat(released("qwen2"), tmp_path / "out", image_token_id=IMAGE_TOKEN)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    logits, expected = _logits(tmp_path / "out", "qwen2")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_an_inner_layer_of_the_vision_tower(released, tmp_path):
    """`select_layer` -2 is the model without its last vision layer."""
    source = released("internlm2")
    _edit_config(source, select_layer=-2)
    convert_internvl_chat(source, tmp_path / "inner", image_token_id=IMAGE_TOKEN)
    _edit_config(source, select_layer=-1, vision_config__num_hidden_layers=1)

    def drop_last_layer(weights):
        for key in [key for key in weights if key.startswith("vision_model.encoder.layers.1.")]:
            del weights[key]

    _edit_weights(source, drop_last_layer)
    convert_internvl_chat(source, tmp_path / "shorter", image_token_id=IMAGE_TOKEN)
    inner, whole = _logits(tmp_path / "inner", "internlm2")
    shorter, _ = _logits(tmp_path / "shorter", "internlm2")
    torch.testing.assert_close(inner, shorter, atol=1e-5, rtol=0)
    assert (inner - whole).abs().max() > 1e-3


def test_variants_of_released_models(released, tmp_path):
    """Query and key norms in the vision tower, scaled rotary embeddings, and a head tied to the embeddings."""
    source = released("qwen2")
    _edit_config(
        source,
        vision_config__qk_normalization=True,
        llm_config__tie_word_embeddings=True,
        llm_config__rope_scaling={"type": "dynamic", "factor": 2.0},
        llm_config__rope_theta=1000000,
    )

    def change(weights):
        del weights["language_model.lm_head.weight"]
        for layer, name in itertools.product(range(2), "qk"):
            key = f"vision_model.encoder.layers.{layer}.attn.{name}_norm.weight"
            weights[key] = torch.full((64,), 1.0 + layer + (name == "k") / 2)

    _edit_weights(source, change)
    config = convert_internvl_chat(source, tmp_path / "out", image_token_id=IMAGE_TOKEN)
    assert config.text_config.rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000000}
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    original = load_file(source / "model.safetensors")
    assert torch.equal(model.lm_head.weight, original["language_model.model.embed_tokens.weight"])
    attention = model.model.vision_tower.encoder.layer[1].attention
    assert attention.q_norm.weight.unique().tolist() == [2.0] and attention.k_norm.weight.unique().tolist() == [2.5]


def test_biases_of_internlm2_are_split_too(released, tmp_path):
    """4 query heads and 2 key-value heads of 16: each group has two queries, a key and a value."""
    source = released("internlm2")
    _edit_config(source, llm_config__bias=True)

    def add_biases(weights):
        for layer in range(2):
            prefix = f"language_model.model.layers.{layer}.attention"
            weights[f"{prefix}.wqkv.bias"] = torch.arange(128.0)
            weights[f"{prefix}.wo.bias"] = torch.zeros(64)

    _edit_weights(source, add_biases)
    convert_internvl_chat(source, tmp_path / "out", image_token_id=IMAGE_TOKEN)
    model = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out")
    attention = model.model.language_model.layers[0].self_attn
    assert attention.q_proj.bias.tolist() == [*range(0, 32), *range(64, 96)]
    assert attention.k_proj.bias.tolist() == [*range(32, 48), *range(96, 112)]
    assert attention.v_proj.bias.tolist() == [*range(48, 64), *range(112, 128)]


def _truncate(name):
    def change(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])

    return change


def _remove(name):
    return lambda folder: (folder / name).unlink()


def _config(**changes):
    return lambda folder: _edit_config(folder, **changes)


def _without_key(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["llm_config"]["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _weights(edit):
    return lambda folder: _edit_weights(folder, edit)


_WQKV = "language_model.model.layers.1.attention.wqkv.weight"


def _lose_shard(folder):
    _shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _lose_tensor_of_shard(folder):
    _shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    weights = load_file(file)
    del weights["mlp1.0.bias"]
    save_file(weights, file)


def _outside(folder):
    _shard(folder)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    index["weight_map"]["mlp1.0.bias"] = "../other/model.safetensors"
    file.write_text(json.dumps(index), encoding="utf-8")


def _tokenizer(change):
    def add(folder):
        _add_sentencepiece(folder)
        change(folder)

    return add


def _without_image_token(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<IMG_CONTEXT>", "<other>"), encoding="utf-8")


def _shifted_token(folder):
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"511"', '"600"'), encoding="utf-8")


def _larger_tokenizer(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["added_tokens_decoder"]["512"] = {"content": "<one more>", "special": True}
    file.write_text(json.dumps(config), encoding="utf-8")


BROKEN = {
    "no config": (_remove("config.json"), ["config.json", "no such file"]),
    "truncated config": (_truncate("config.json"), ["config.json", "truncated"]),
    "foreign config": (_config(model_type="llava"), ["config.json", "model_type = 'llava'"]),
    "foreign language model": (
        _config(llm_config__architectures=["Phi3ForCausalLM"]),
        ["config.json", "llm_config.architectures", "Phi3ForCausalLM"],
    ),
    "missing key": (_without_key, ["config.json", "'llm_config.num_key_value_heads' is missing"]),
    "wrong type": (_config(vision_config__hidden_size="wide"), ["config.json", "vision_config.hidden_size = 'wide'"]),
    "other shuffle": (_config(ps_version="v1"), ["ps_version = 'v1'"]),
    "other tiles": (_config(use_thumbnail=False), ["use_thumbnail = False"]),
    "no weights": (_remove("model.safetensors"), ["model.safetensors", "no such file"]),
    "truncated weights": (_truncate("model.safetensors"), ["model.safetensors", "truncated"]),
    "missing tensor": (_weights(lambda weights: weights.pop(_WQKV)), [_WQKV, "is missing"]),
    "missing head": (
        _weights(lambda weights: weights.pop("language_model.output.weight")),
        ["language_model.output.weight", "is missing"],
    ),
    "foreign tensor": (
        _weights(lambda weights: weights.update({"language_model.model.layers.2.wo": torch.zeros(1)})),
        ["model.safetensors", "language_model.model.layers.2.wo", "no place"],
    ),
    "wrong shape": (
        _weights(lambda weights: weights.update({_WQKV: torch.zeros(96, 64)})),
        [_WQKV, "(96, 64)", "(128, 64)"],
    ),
    "missing shard": (_lose_shard, ["model-00002-of-00002.safetensors", "no such file"]),
    "tensor missing from its shard": (_lose_tensor_of_shard, ["mlp1.0.bias", "model-00002-of-00002.safetensors"]),
    "shard outside": (_outside, ["model.safetensors.index.json", "outside"]),
    "truncated tokenizer": (_tokenizer(_truncate("tokenizer.model")), ["tokenizer.model", "truncated"]),
    "foreign tokenizer": (_tokenizer(_without_image_token), ["<IMG_CONTEXT>"]),
    "shifted token": (_tokenizer(_shifted_token), ["600"]),
    "larger tokenizer": (_tokenizer(_larger_tokenizer), ["513 tokens", "llm_config.vocab_size", "512"]),
    "unknown conversation": (_tokenizer(_config(template="vicuna")), ["template = 'vicuna'"]),
}


BROKEN_WITH_TOKENIZER = list(BROKEN)[list(BROKEN).index("truncated tokenizer") :]


@pytest.mark.parametrize("case", BROKEN)
def test_broken_sources(case, released, tmp_path, capsys):
    change, words = BROKEN[case]
    source = released("internlm2")
    change(source)
    target = tmp_path / "target"
    arguments = [] if case in BROKEN_WITH_TOKENIZER else ["--image_token_id", str(IMAGE_TOKEN)]
    assert main(["convert", "internvl-chat", str(source), str(target / "out"), *arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("mm-prm convert: ")
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert not target.exists() or not list(target.iterdir())


def test_nothing_half_written_is_left(released, tmp_path, monkeypatch):
    source = released("internlm2")
    _add_sentencepiece(source)

    def full_disk(processor, folder):
        assert (Path(folder) / "model.safetensors").exists()
        raise OSError("No space left on device")

    monkeypatch.setattr(InternVLProcessor, "save_pretrained", full_disk)
    (tmp_path / "target" / ".out.unfinished" / "out").mkdir(parents=True)  # of a run that was killed
    with pytest.raises(OSError, match="No space left"):
        convert_internvl_chat(source, tmp_path / "target" / "out")
    assert not list((tmp_path / "target").iterdir())


def test_command(released, tmp_path, capsys):
    source, out = released("qwen2"), tmp_path / "new" / "out"
    arguments = ["convert", "internvl-chat", str(source), str(out)]
    assert main(arguments) == 2
    assert "--image_token_id N" in capsys.readouterr().err
    assert main([*arguments, "--image_token_id", "512"]) == 2
    assert "image_token_id = 512: must be below the vocabulary's size, 512" in capsys.readouterr().err
    assert main(["convert", "--image_token_id", str(IMAGE_TOKEN), *arguments[1:]]) == 0
    assert f"{out}: InternVLForConditionalGeneration, float32, language model qwen2" in capsys.readouterr().out
    logits, expected = _logits(out, "qwen2")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)

    # What is there is not overwritten; the settings that were written read back.
    assert main(["convert", "--config", f"{out}.settings.yaml"]) == 2
    assert "there is something already" in capsys.readouterr().err
    assert main(["convert", "other", "a", "b"]) == 2
    assert "kind: 'other' is not" in capsys.readouterr().err
    assert main(["convert", "internvl-chat", "a", "b", "c"]) == 2
    assert "'c' is one word too many" in capsys.readouterr().err
