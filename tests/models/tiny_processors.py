"""Each family's own processor and chat template at a small size, with a tokenizer trained on the spot."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ImageProcessor,
    Gemma3Processor,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from ..testing_utils import SENTENCES

# The first special token fills up, the second ends a turn. The chat templates are those of the published checkpoints,
# shortened to what user turns need.
_QWEN_TOKENS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"]
_QWEN_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
_CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN_TEMPLATE = _CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '[INST]' }}{% for block in message['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}{% elif block['type'] == 'image' %}{{ '[IMG]' }}{% endif %}"
    "{% endfor %}{{ '[/INST]' }}{% endfor %}"
)
_GLM_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif item['type'] == 'text' %}{{ item['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def build_tokenizer(
    special_tokens: list[str], *, bos_token: str | None = None, adds_bos: bool = False, **named_tokens: str
) -> PreTrainedTokenizerFast:
    """
    Trains a byte-level BPE tokenizer on a few sentences.

    Args:
        special_tokens (`list[str]`):
            Special tokens; the first fills up, the second ends a turn.
        bos_token (`str`, *optional*):
            Token that begins a text.
        adds_bos (`bool`, *optional*, defaults to `False`):
            Whether the tokenizer puts it there by itself, as Llama's does.
        named_tokens (`str`):
            Tokens that the processor asks the tokenizer for, by attribute.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special_tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_token} $A", special_tokens=[(bos_token, tokenizer.token_to_id(bos_token))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special_tokens[0],
        eos_token=special_tokens[1],
        bos_token=bos_token,
        extra_special_tokens=named_tokens,
    )


def _qwen2_vl() -> ProcessorMixin:
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tokenizer=build_tokenizer(_QWEN_TOKENS),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_QWEN_TEMPLATE,
    )


def _qwen2_5_vl() -> ProcessorMixin:
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=84 * 84),
        tokenizer=build_tokenizer(_QWEN_TOKENS),
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=_QWEN_TEMPLATE,
    )


def _qwen3_vl() -> ProcessorMixin:
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56, patch_size=14),
        tokenizer=build_tokenizer(_QWEN_TOKENS),
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=_QWEN_TEMPLATE,
    )


def _internvl() -> ProcessorMixin:
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    size = {"height": 28, "width": 28}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=build_tokenizer([*_QWEN_TOKENS[:3], *names.values()], **names),
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=_CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )


_IDEFICS_TOKENS = ["<|endoftext|>", "<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>", "<image>"]
_IDEFICS_TOKENS += ["<global-img>", *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))]


def _idefics3() -> ProcessorMixin:
    return Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        tokenizer=build_tokenizer(_IDEFICS_TOKENS),
        image_seq_len=4,
        chat_template=_IDEFICS_TEMPLATE,
    )


def _smolvlm() -> ProcessorMixin:
    sizes = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}}
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**sizes),
        tokenizer=build_tokenizer(_IDEFICS_TOKENS),
        video_processor=SmolVLMVideoProcessor(**sizes),
        image_seq_len=4,
        chat_template=_IDEFICS_TEMPLATE,
    )


def _llava_onevision() -> ProcessorMixin:
    size = {"height": 28, "width": 28}
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
        tokenizer=build_tokenizer([*_QWEN_TOKENS[:3], "<image>", "<video>"]),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_ONEVISION_TEMPLATE,
    )


def _gemma3() -> ProcessorMixin:
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokens = ["<pad>", "<end_of_turn>", "<bos>", "<start_of_turn>", *names.values()]
    return Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=build_tokenizer(tokens, bos_token="<bos>", adds_bos=True, **names),
        image_seq_length=4,
        chat_template=_GEMMA_TEMPLATE,
    )


def _mistral3() -> ProcessorMixin:
    tokens = ["<pad>", "</s>", "<s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    return PixtralProcessor(
        image_processor=PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 7, "width": 7}),
        tokenizer=build_tokenizer(tokens, bos_token="<s>", adds_bos=True),
        patch_size=7,
        spatial_merge_size=2,
        chat_template=_MISTRAL_TEMPLATE,
    )


def _glm4v() -> ProcessorMixin:
    tokens = ["<|endoftext|>", "<|user|>", "<|assistant|>", "[gMASK]", "<sop>", "<|image|>", "<|video|>"]
    tokens += [f"<|{border}_of_{kind}|>" for kind in ("image", "video") for border in ("begin", "end")]
    size = {"shortest_edge": 28 * 28 * 2, "longest_edge": 56 * 56 * 2}
    return Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=size),
        tokenizer=build_tokenizer(tokens),
        video_processor=Glm4vVideoProcessor(size=size),
        chat_template=_GLM_TEMPLATE,
    )


def _qwen2() -> PreTrainedTokenizerBase:
    tokenizer = build_tokenizer(_QWEN_TOKENS[:3])
    tokenizer.chat_template = _CHATML
    return tokenizer


def _llama() -> PreTrainedTokenizerBase:
    tokens = ["<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = build_tokenizer(tokens, bos_token="<|begin_of_text|>", adds_bos=True)
    tokenizer.chat_template = LLAMA_TEMPLATE
    return tokenizer


PROCESSORS = {
    "cohere": _llama,
    "gemma2": _llama,
    "gemma3": _gemma3,
    "glm4v": _glm4v,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "llama": _llama,
    "llava_onevision": _llava_onevision,
    "mistral3": _mistral3,
    "qwen2": _qwen2,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
    "smolvlm": _smolvlm,
}
