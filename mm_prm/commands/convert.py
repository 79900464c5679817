"""`mm-prm convert`: a checkpoint in a foreign layout in, one that transformers loads without remote code out.

mm-prm convert internvl-chat SRC DST
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mm_prm.commands import InputError, reading_input
from mm_prm.settings import parse_settings, write_settings

_POSITIONAL = ("kind", "source", "destination")


@dataclass
class ConvertSettings:
    """
    What is converted, and where it goes. The first three may be given in this order without their names.

    Args:
        kind (`str`):
            Layout of the source: `internvl-chat`, as MM-PRM, VisualPRM and InternVL 2.5 were released.
        source (`str`):
            Folder of the released checkpoint.
        destination (`str`):
            New folder for the converted checkpoint.
        image_token_id (`int`, *optional*):
            Id of the image token, needed where the source has no tokenizer files.
    """

    kind: Literal["internvl-chat"]
    source: str
    destination: str
    image_token_id: int | None = None


def main(args: Sequence[str], prog: str) -> int:
    """Run the command; returns its exit status."""
    settings = parse_settings(
        ConvertSettings,
        _named(args),
        prog=prog,
        description=f"Make a foreign checkpoint one that transformers loads: {prog} internvl-chat SRC DST",
    )
    return run(settings)


def _named(args: Sequence[str]) -> list[str]:
    """Give positional words the names of their settings, so that one parser checks them and a file's alike."""
    named: list[str] = []
    positional: list[str] = []
    for index, word in enumerate(args):
        before = args[index - 1] if index else ""
        if word.startswith("-") or (before.startswith("--") and "=" not in before):
            named.append(word)
        else:
            positional.append(word)
    if len(positional) > len(_POSITIONAL):
        raise InputError(f"{positional[len(_POSITIONAL)]!r} is one word too many; give KIND SRC DST")
    for name, word in zip(_POSITIONAL, positional, strict=False):
        named += [f"--{name}", word]
    return named


def run(settings: ConvertSettings) -> int:
    """Convert, and print what came out."""
    from mm_prm.models.convert_internvl_chat import convert_internvl_chat

    source, destination = Path(settings.source).expanduser(), Path(settings.destination).expanduser()
    with reading_input():
        config: Any = convert_internvl_chat(source, destination, image_token_id=settings.image_token_id)
    write_settings(destination.parent, settings, f"{destination.name}.settings.yaml")
    text, vision = config.text_config, config.vision_config
    print(
        f"{destination}: {config.architectures[0]}, {str(config.dtype).removeprefix('torch.')}, language model {text.model_type} "
        f"({text.num_hidden_layers} layers, {text.hidden_size} wide, {text.vocab_size} tokens), vision tower "
        f"({vision.num_hidden_layers} layers, {vision.hidden_size} wide), {config.image_seq_length} tokens a tile"
    )
    return 0
