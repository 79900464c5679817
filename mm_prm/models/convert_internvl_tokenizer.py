"""Tokenizers and chat templates of released InternVLChat checkpoints, as transformers has them without remote code.

InternLM2 checkpoints carry a SentencePiece model, Qwen2 checkpoints a byte-level vocabulary with merges. Both become a
fast tokenizer with the same ids. The conversation formats live in the ancestor's program; here they become a chat
template.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

from .convert_internvl_config import Released, read_json

CONTEXT_TOKEN = "<IMG_CONTEXT>"
END_OF_TURN = "<|im_end|>"

# What `InternVLProcessor` asks the tokenizer for. The released layout has no `<video>`.
_NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": CONTEXT_TOKEN,
    "video_token": "<video>",
}
# Those that the classes of the released tokenizers have when tokenizer_config.json does not say.
_INTERNLM2_DEFAULTS = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "add_bos_token": True,
}
_QWEN2_DEFAULTS = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}

# Separator and system message of the conversation formats, by the name in config.json.
_INTERNVL_2 = (
    "<|im_end|>",
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
)
_CONVERSATIONS = {
    "internvl2_5": (
        "<|im_end|>\n",
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。",
    ),
    "internlm2-chat": _INTERNVL_2,
    "Hermes-2": _INTERNVL_2,
}
# As the released program writes conversations: images that open a message stand on lines of their own, others where the
# message has them.
_CHAT_TEMPLATE = (
    "{{ BOS }}"
    "{% if not messages or messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n' + SYSTEM + SEPARATOR }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% set seen = namespace(text=false) %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}"
    "{% set seen.text = true %}{{ part['text'] }}"
    "{% elif part['type'] in ('image', 'video') %}"
    "{{ '<IMG_CONTEXT>' if part['type'] == 'image' else '<video>' }}"
    "{% set next = loop.nextitem['text'] if loop.nextitem is defined and loop.nextitem['type'] == 'text' else '' %}"
    "{% if not seen.text and not next.startswith('\\n') %}{{ '\\n' }}{% endif %}"
    "{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{{ SEPARATOR }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_template(released: Released, tokenizer: PreTrainedTokenizerFast) -> str:
    """
    Write the conversation format that config.json names as a chat template.

    Args:
        released ([`Released`]):
            The released configuration.
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            The converted tokenizer; texts begin as it begins them.
    """
    name = released.get("template", str)
    if name not in _CONVERSATIONS:
        raise released.refuse("template", f"the conversation formats known are {', '.join(_CONVERSATIONS)}")
    separator, system = _CONVERSATIONS[name]
    system = released.get("system_message", str) if "system_message" in released.values else system
    bos = tokenizer.bos_token if tokenizer.add_bos_token else ""
    template = _CHAT_TEMPLATE
    for word, text in (("BOS", bos), ("SEPARATOR", separator), ("SYSTEM", system)):
        template = template.replace(word, json.dumps(text, ensure_ascii=False))
    return template


def convert_tokenizer(source: Path) -> PreTrainedTokenizerFast | None:
    """
    Build a fast tokenizer out of a released checkpoint's tokenizer files.

    Args:
        source (`Path`):
            Folder of the checkpoint.

    Returns:
        [`~transformers.PreTrainedTokenizerFast`]: The tokenizer, or `None` where there are no tokenizer files.
    """
    config_file = source / "tokenizer_config.json"
    model_file, vocabulary_file, fast_file = (
        source / name for name in ("tokenizer.model", "vocab.json", "tokenizer.json")
    )
    if not (model_file.exists() or vocabulary_file.exists() or fast_file.exists()):
        return None
    settings = read_json(config_file) if config_file.exists() else {}
    added = _added_tokens(source, settings)
    if model_file.exists():
        backend = _from_sentencepiece(model_file, added)
        defaults: dict[str, Any] = _INTERNLM2_DEFAULTS
    elif vocabulary_file.exists():
        backend = _from_vocabulary(vocabulary_file, source / "merges.txt")
        defaults = _QWEN2_DEFAULTS
    else:
        backend = _from_json(fast_file)
        defaults = _QWEN2_DEFAULTS
    for token_id, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(
                f"{source}: the added token {token.content!r} should have the id {token_id}, but gets "
                f"{backend.token_to_id(token.content)}: the vocabulary does not belong to it"
            )
    for name in (CONTEXT_TOKEN, "<img>", "</img>", END_OF_TURN):
        if backend.token_to_id(name) is None:
            raise ValueError(f"{source}: the tokenizer has no token {name!r}; it is not that of an InternVLChat model")

    roles = ("unk_token", "bos_token", "eos_token", "pad_token")
    named = {role: _content(settings.get(role, defaults.get(role))) for role in roles}
    for name, text in named.items():
        if text is not None and backend.token_to_id(text) is None:
            raise ValueError(f"{source}: {name} = {text!r} is not in the vocabulary")
    length = settings.get("model_max_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        add_bos_token=bool(settings.get("add_bos_token", defaults.get("add_bos_token", False))),
        add_eos_token=bool(settings.get("add_eos_token", False)),
        extra_special_tokens=_NAMED_TOKENS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **({"model_max_length": length} if isinstance(length, int) else {}),
    )


def _content(token: Any) -> str | None:
    """Text of a token, which tokenizer_config.json spells out or describes."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(source: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the vocabulary, by id. Text is searched for them before it is normalised."""
    if "added_tokens_decoder" in settings:
        described = {int(token_id): dict(token) for token_id, token in settings["added_tokens_decoder"].items()}
    else:
        file = source / "added_tokens.json"
        names = read_json(file) if file.exists() else {}
        described = {int(token_id): {"content": name, "special": True} for name, token_id in names.items()}
    return {token_id: AddedToken(**{**token, "normalized": False}) for token_id, token in described.items()}


def _from_sentencepiece(file: Path, added: dict[int, AddedToken]) -> Tokenizer:
    """The byte-pair encoding of a SentencePiece model, with its normalisation."""
    try:
        model = import_protobuf("mm-prm").ModelProto()
    except ImportError as error:
        raise ValueError(f"{file}: reading it needs protobuf: pip install 'mm-prm[convert]'") from error
    from google.protobuf.message import DecodeError

    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{file}: broken or truncated SentencePiece model: {error}") from error
    if not (model.pieces and model.HasField("trainer_spec") and model.HasField("normalizer_spec")):
        raise ValueError(f"{file}: broken or truncated SentencePiece model")
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != trainer.BPE or trainer.treat_whitespace_as_suffix or not normalizer.escape_whitespaces:
        raise ValueError(f"{file}: only byte-pair models that mark the beginning of words are converted")
    kinds = type(model.pieces[0])
    # Added tokens may take the place of pieces that were set aside for them.
    own_symbols = [
        piece.piece
        for index, piece in enumerate(model.pieces)
        if piece.type == kinds.USER_DEFINED and index not in added
    ]
    rewrites = normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    if own_symbols and rewrites:
        raise ValueError(
            f"{file}: the piece {own_symbols[0]!r} is user-defined: such pieces are converted only where text is not "
            "normalised"
        )

    names = [added[index].content if index in added else piece.piece for index, piece in enumerate(model.pieces)]
    vocabulary = {name: index for index, name in enumerate(names)}
    # Of the pieces, only normal ones come about by merging.
    scores = [
        (piece.piece, piece.score)
        for index, piece in enumerate(model.pieces)
        if piece.type == kinds.NORMAL and index not in added
    ]
    backend = Tokenizer(
        BPE(
            vocabulary,
            generate_merges(vocabulary, scores),
            unk_token=names[trainer.unk_id],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    backend.normalizer = _sentencepiece_normalizer(normalizer)
    strip = [decoders.Strip(content=" ", left=1)] if normalizer.add_dummy_prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    backend.add_tokens([AddedToken(symbol, normalized=False) for symbol in own_symbols])
    return backend


def _sentencepiece_normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)


def _from_vocabulary(vocabulary_file: Path, merges_file: Path) -> Tokenizer:
    """Qwen2's byte-level encoding, from its two files."""
    vocabulary = read_json(vocabulary_file)
    if not merges_file.is_file():
        raise FileNotFoundError(f"{merges_file}: there is no such file, but {vocabulary_file.name} needs it")
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    # Without tokens of its own, which would take the ids of the first added ones.
    no_tokens: dict[str, Any] = dict.fromkeys(("unk_token", "eos_token", "pad_token"))
    parts: dict[str, Any] = {"vocab": vocabulary, "merges": merges}
    try:
        return Qwen2Tokenizer(**parts, **no_tokens).backend_tokenizer
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(f"{merges_file}: does not fit {vocabulary_file.name}: {error}") from error


def _from_json(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare exceptions
        raise ValueError(f"{file}: broken or truncated tokenizer: {error}") from error
