"""The multimodal half of `tiny_models`: random-weight folders with a vision tower, a processor and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from .tiny_models import VOCAB, make_tokenizer, randomize, save_weights, write_json

_TEXT = dict(
    hidden_size=64, num_hidden_layers=3, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-6, vocab_size=VOCAB, max_position_embeddings=4096,
)  # fmt: skip
_TOWER = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)
_HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True)


def _chat(turn: str, end: str, image: str, assistant: str) -> str:
    return (
        "{% for m in messages %}" + turn + "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{% if c.type in ('image', 'image_url') %}" + image + "{% elif c.type == 'text' %}"
        "{{ c.text }}{% endif %}{% endfor %}{% endif %}" + end + "{% endfor %}"
        "{% if add_generation_prompt %}" + assistant + "{% endif %}"
    )  # fmt: skip


def _qwen_ids(ids: dict[str, int]) -> dict[str, Any]:
    return dict(
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"], eos_token_id=[ids["<|im_end|>"]], vocab_size=VOCAB,
    )  # fmt: skip


def _qwen2(out: Path, model_type: str) -> dict[str, Any]:
    ids = make_tokenizer(out)
    vision = dict(
        model_type=model_type, depth=2, num_heads=4, image_size=112, patch_size=14, spatial_patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, in_channels=3, in_chans=3,
    )  # fmt: skip
    if model_type == "qwen2_vl":
        vision |= dict(embed_dim=64, hidden_size=64, mlp_ratio=2)
    else:
        vision |= dict(
            hidden_size=64, intermediate_size=128, out_hidden_size=64, window_size=56, fullatt_block_indexes=[1]
        )
    write_json(
        out / "preprocessor_config.json",
        dict(
            image_processor_type="Qwen2VLImageProcessor",
            processor_class="Qwen2VLProcessor" if model_type == "qwen2_vl" else "Qwen2_5_VLProcessor",
            min_pixels=3136, max_pixels=28 * 28 * 64, patch_size=14, merge_size=2, temporal_patch_size=2,
            image_mean=[0.48, 0.46, 0.41], image_std=[0.27, 0.26, 0.28],
        ),
    )  # fmt: skip
    return dict(
        model_type=model_type, **_qwen_ids(ids), **{k: v for k, v in _TEXT.items() if k != "vocab_size"},
        rope_theta=1e4, rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]}, tie_word_embeddings=True,
        vision_config=vision,
    )  # fmt: skip


def _qwen3(out: Path, model_type: str) -> dict[str, Any]:
    ids = make_tokenizer(out)
    text: dict[str, Any] = dict(_TEXT, model_type=f"{model_type}_text", head_dim=16, rope_theta=1e4)
    text |= dict(tie_word_embeddings=True)
    tower = "qwen3_vl" if model_type.startswith("qwen3_vl") else model_type
    if model_type.startswith("qwen3_5"):
        text |= dict(
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
            linear_conv_kernel_dim=4, full_attention_interval=2, num_hidden_layers=4,
            rope_parameters={
                "type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                "mrope_interleaved": True,
            },
        )  # fmt: skip
    else:
        text |= dict(rope_scaling={"type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True})
    if model_type.endswith("moe"):
        text |= dict(
            num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=32,
            norm_topk_prob=True, shared_expert_intermediate_size=32,
        )  # fmt: skip
    write_json(
        out / "preprocessor_config.json",
        dict(
            image_processor_type="Qwen2VLImageProcessorFast", processor_class="Qwen3VLProcessor",
            size=dict(shortest_edge=1024, longest_edge=32 * 32 * 64), patch_size=16, merge_size=2,
            temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        ),
    )  # fmt: skip
    write_json(
        out / "video_preprocessor_config.json",
        dict(
            size=dict(shortest_edge=1024, longest_edge=32 * 32 * 64), patch_size=16, merge_size=2,
            temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_frames=2,
        ),
    )  # fmt: skip
    return dict(
        model_type=model_type, **_qwen_ids(ids), text_config=text,
        vision_config=dict(
            model_type=tower if model_type != "qwen3_vl_moe" else "qwen3_vl_moe", depth=2, hidden_size=64,
            intermediate_size=128, out_hidden_size=64, num_heads=4, image_size=128, patch_size=16,
            spatial_patch_size=16, spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=64,
            deepstack_visual_indexes=[] if model_type.startswith("qwen3_5") else [0], in_channels=3,
        ),
    )  # fmt: skip


def _llava(out: Path, model_type: str) -> dict[str, Any]:
    chat = _chat("{{ m.role|upper }}: ", "\n", "<image>\n", "ASSISTANT: ")
    ids = make_tokenizer(
        out, specials=["<s>", "</s>", "<unk>", "<pad>", "<image>", "<video>"], chat_template=chat, pad="<pad>",
        tokenizer_class="PreTrainedTokenizerFast", eos="</s>",
        extra={"bos_token": "<s>", "image_token": "<image>", "extra_special_tokens": {"image_token": "<image>"}},
    )  # fmt: skip
    name = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[model_type]
    pinpoints = [[56, 112], [112, 56], [112, 112], [56, 168]]
    siglip = model_type == "llava_onevision"
    image = dict(
        _HALF, image_processor_type="CLIPImageProcessor" if model_type == "llava" else f"{name}ImageProcessor",
        processor_class=f"{name}Processor", do_resize=True, size=dict(shortest_edge=56), do_center_crop=True,
        crop_size=dict(height=56, width=56), do_convert_rgb=True, resample=3, image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    if siglip:
        image |= dict(size=dict(height=56, width=56), do_center_crop=False)
    write_json(out / "preprocessor_config.json", image)
    write_json(
        out / "processor_config.json",
        dict(
            processor_class=f"{name}Processor", patch_size=14, image_token="<image>", num_image_tokens=16,
            vision_feature_select_strategy="full" if siglip else "default", video_token="<video>",
            num_additional_image_tokens=0 if siglip else 1, vision_aspect_ratio="anyres_max_9",
        ),
    )  # fmt: skip
    return dict(
        model_type=model_type, image_token_index=ids["<image>"], vision_feature_layer=-1 if siglip else -2,
        video_token_index=ids["<video>"], vision_feature_select_strategy="full" if siglip else "default",
        eos_token_id=[ids["</s>"]], image_grid_pinpoints=pinpoints, use_image_newline_parameter=True,
        vision_aspect_ratio="anyres_max_9", tie_word_embeddings=False,
        text_config=dict(_TEXT, model_type="qwen2" if siglip else "llama", rope_theta=1e4),
        vision_config=dict(
            _TOWER, model_type="siglip_vision_model" if siglip else "clip_vision_model", num_hidden_layers=3,
            image_size=56, patch_size=14, projection_dim=64,
        ),
    )  # fmt: skip


def _idefics(out: Path, model_type: str) -> dict[str, Any]:
    specials = ["<|im_start|>", "<|im_end|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"]
    specials += ["<image>", *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))]
    names = {
        "image_token": "<image>", "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>",
    }  # fmt: skip
    chat = _chat("{{ m.role|capitalize }}:", "<end_of_utterance>\n", "<image>", "Assistant:")
    ids = make_tokenizer(
        out, specials=specials, tokenizer_class="PreTrainedTokenizerFast", pad="<|im_end|>", eos="<end_of_utterance>",
        chat_template="<|im_start|>" + chat,
        extra={"bos_token": "<|im_start|>", "extra_special_tokens": names},
    )  # fmt: skip
    name = "Idefics3" if model_type == "idefics3" else "SmolVLM"
    # SmolVLM is built with tiles, Idefics3 without, so that both layouts are met.
    splits = model_type == "smolvlm"
    write_json(
        out / "preprocessor_config.json",
        dict(
            _HALF, image_processor_type=f"{name}ImageProcessor", processor_class=f"{name}Processor",
            do_image_splitting=splits, do_resize=True, do_convert_rgb=True, do_pad=True, resample=1,
            size=dict(longest_edge=128 if splits else 64), max_image_size=dict(longest_edge=64),
        ),
    )  # fmt: skip
    write_json(out / "processor_config.json", dict(processor_class=f"{name}Processor", image_seq_len=4))
    return dict(
        model_type=model_type, image_token_id=ids["<image>"], scale_factor=2, vocab_size=VOCAB,
        eos_token_id=[ids["<end_of_utterance>"]], text_config=dict(_TEXT, model_type="llama", rope_theta=1e4),
        vision_config=dict(
            _TOWER, model_type="idefics3" if model_type == "idefics3" else "smolvlm_vision", patch_size=16,
            num_hidden_layers=2, image_size=64,
        ),
    )  # fmt: skip


def _gemma3(out: Path, model_type: str) -> dict[str, Any]:
    specials = (
        "<pad> <eos> <bos> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>"
    ).split()
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turn = "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    chat = _chat(turn, "<end_of_turn>\n", "<start_of_image>", "<start_of_turn>model\n")
    ids = make_tokenizer(
        out, specials=specials, tokenizer_class="PreTrainedTokenizerFast", chat_template="{{ bos_token }}" + chat,
        pad="<pad>", eos="<end_of_turn>", extra={"bos_token": "<bos>", **names, "extra_special_tokens": names},
    )  # fmt: skip
    write_json(
        out / "preprocessor_config.json",
        dict(
            _HALF, image_processor_type="Gemma3ImageProcessor", processor_class="Gemma3Processor",
            size=dict(height=56, width=56), do_resize=True, resample=2, image_seq_length=4,
        ),
    )  # fmt: skip
    write_json(out / "processor_config.json", dict(processor_class="Gemma3Processor", image_seq_length=4))
    return dict(
        model_type="gemma3", image_token_index=ids["<image_soft_token>"], boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"], mm_tokens_per_image=4, vocab_size=VOCAB, pad_token_id=ids["<pad>"],
        eos_token_id=[ids["<end_of_turn>"]], hidden_size=64,
        text_config=dict(
            _TEXT, model_type="gemma3_text", head_dim=16, rope_theta=1e6, sliding_window=24, sliding_window_pattern=3,
            query_pre_attn_scalar=16, mm_tokens_per_image=4,
        ),
        vision_config=dict(
            _TOWER, model_type="siglip_vision_model", num_hidden_layers=2, patch_size=14, image_size=56
        ),
    )  # fmt: skip


def _mistral3(out: Path, model_type: str) -> dict[str, Any]:
    specials = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    ids = make_tokenizer(
        out, specials=specials, tokenizer_class="PreTrainedTokenizerFast", pad="<pad>", eos="</s>",
        chat_template="<s>" + _chat("[INST]", "[/INST]", "[IMG]", ""), extra={"bos_token": "<s>"},
    )  # fmt: skip
    name = "PixtralProcessor" if model_type == "pixtral" else "Mistral3Processor"
    merge = 1 if model_type == "pixtral" else 2
    write_json(
        out / "preprocessor_config.json",
        dict(
            _HALF, image_processor_type="PixtralImageProcessor", processor_class=name, do_resize=True, resample=3,
            size=dict(longest_edge=112), patch_size=dict(height=14, width=14),
        ),
    )  # fmt: skip
    write_json(
        out / "processor_config.json",
        dict(
            processor_class=name, patch_size=14, spatial_merge_size=merge, image_token="[IMG]",
            image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]",
        ),
    )  # fmt: skip
    text = dict(_TEXT, model_type="mistral", head_dim=16, rope_theta=1e4)
    if model_type == "mistral3":
        # The language model of Ministral 3: attention scaled by position.
        text |= dict(
            model_type="ministral3", sliding_window=None,
            rope_parameters=dict(
                rope_type="default", type="default", rope_theta=1e4, llama_4_scaling_beta=0.1,
                original_max_position_embeddings=16,
            ),
        )  # fmt: skip
    return dict(
        model_type=model_type, image_token_index=ids["[IMG]"], vision_feature_layer=-1, spatial_merge_size=merge,
        vision_feature_select_strategy="full", eos_token_id=[ids["</s>"]], vocab_size=VOCAB, text_config=text,
        vision_config=dict(
            _TOWER, model_type="pixtral", num_hidden_layers=2, head_dim=16, patch_size=14, image_size=112,
            rope_theta=1e4,
        ),
    )  # fmt: skip


def _internvl(out: Path, model_type: str) -> dict[str, Any]:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    ids = make_tokenizer(
        out, specials=specials, chat_template=_chat("<|im_start|>{{ m.role }}\n", "<|im_end|>\n", "<image>\n", "A:")
    )
    write_json(out / "preprocessor_config.json", dict(_HALF, processor_class="InternVLChatProcessor"))
    if model_type == "internvl":
        write_json(out / "processor_config.json", dict(processor_class="InternVLProcessor", image_seq_length=4))
    text = dict(_TEXT, model_type="qwen3" if model_type == "internvl" else "qwen2", rope_theta=1e4)
    text |= dict(head_dim=16, tie_word_embeddings=True, attention_bias=model_type != "internvl")
    return dict(
        model_type=model_type, image_token_index=ids["<IMG_CONTEXT>"], image_token_id=ids["<IMG_CONTEXT>"],
        eos_token_id=[ids["<|im_end|>"]], downsample_ratio=0.5, force_image_size=56, max_dynamic_patch=4,
        min_dynamic_patch=1, use_thumbnail=True, vision_feature_layer=-1, vocab_size=VOCAB,
        **{"text_config" if model_type == "internvl" else "llm_config": text},
        vision_config=dict(
            _TOWER, model_type="intern_vit_6b" if model_type != "internvl" else "internvl_vision",
            num_hidden_layers=2, patch_size=14, image_size=56,
        ),
    )  # fmt: skip


def _gemma4(out: Path, model_type: str) -> dict[str, Any]:
    specials = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|image>", "<image|>", "<|image|>", "<|audio|>"]
    names = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "audio_token": "<|audio|>"}
    chat = "{{ bos_token }}" + _chat("<|turn>{{ m.role }}\n", "<turn|>\n", "<|image|>", "<|turn>model\n")
    hears = model_type == "gemma4_audio"
    if hears:
        specials += ["<|audio>", "<audio|>"]
        names |= {"boa_token": "<|audio>", "eoa_token": "<audio|>"}
        text = "{% elif c.type == 'text' %}"
        chat = chat.replace(text, "{% elif c.type == 'audio' %}<|audio|>" + text)
    ids = make_tokenizer(
        out, specials=[*specials, "<|video|>"], tokenizer_class="PreTrainedTokenizerFast", chat_template=chat,
        pad="<pad>", eos="<turn|>", extra={"bos_token": "<bos>", **names, "extra_special_tokens": names},
    )  # fmt: skip
    processor = dict(patch_size=8, max_soft_tokens=8, pooling_kernel_size=2)
    write_json(out / "preprocessor_config.json", processor)
    write_json(
        out / "processor_config.json",
        dict(
            processor_class="Gemma4Processor", image_seq_length=8, image_processor=dict(processor),
            audio_seq_length=50, audio_ms_per_token=40,
        ),
    )  # fmt: skip
    audio = dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, output_proj_dims=64,
        subsampling_conv_channels=[8, 4],
    )  # fmt: skip
    return dict(
        model_type="gemma4", image_token_id=ids["<|image|>"], audio_token_id=ids["<|audio|>"],
        boi_token_id=ids["<|image>"], eoi_token_id=ids["<image|>"], pad_token_id=ids["<pad>"],
        eos_token_id=[ids["<turn|>"]], vocab_size=VOCAB, audio_config=audio if hears else None, hidden_size=64,
        text_config=dict(
            _TEXT, model_type="gemma4_text", num_hidden_layers=6, head_dim=16, global_head_dim=16,
            vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16, num_kv_shared_layers=2,
            sliding_window=24, sliding_window_pattern=2, use_bidirectional_attention="vision",
            layer_types=["sliding_attention", "full_attention"] * 3, use_double_wide_mlp=False,
        ),
        vision_config=dict(
            _TOWER, model_type="gemma4_vision", num_hidden_layers=2, num_key_value_heads=4, head_dim=16,
            global_head_dim=16, patch_size=8, pooling_kernel_size=2, default_output_length=8,
            position_embedding_size=64,
        ),
    )  # fmt: skip


def _paligemma(out: Path, model_type: str) -> dict[str, Any]:
    names = {"bos_token": "<bos>", "image_token": "<image>", "extra_special_tokens": {"image_token": "<image>"}}
    ids = make_tokenizer(
        out, specials=["<pad>", "<eos>", "<bos>", "<image>"], tokenizer_class="PreTrainedTokenizerFast", pad="<pad>",
        eos="<eos>", extra=names, chat_template="",
    )  # fmt: skip
    write_json(
        out / "preprocessor_config.json",
        dict(
            _HALF, image_processor_type="SiglipImageProcessor", processor_class="PaliGemmaProcessor", do_resize=True,
            size=dict(height=56, width=56), image_seq_length=16, resample=3,
        ),
    )  # fmt: skip
    text = dict(_TEXT, model_type="gemma", head_dim=16, rope_theta=1e4, num_image_tokens=16)
    return dict(
        model_type="paligemma", image_token_index=ids["<image>"], pad_token_id=ids["<pad>"], hidden_size=64,
        eos_token_id=[ids["<eos>"]], vocab_size=VOCAB, projection_dim=64, text_config=text,
        vision_config=dict(
            _TOWER, model_type="siglip_vision_model", num_hidden_layers=2, patch_size=14, image_size=56,
            projection_dim=64,
        ),
    )  # fmt: skip


def _mllama(out: Path, model_type: str) -> dict[str, Any]:
    names = {"bos_token": "<s>", "image_token": "<|image|>", "extra_special_tokens": {"image_token": "<|image|>"}}
    ids = make_tokenizer(
        out, specials=["<s>", "<pad>", "<|eot|>", "<|image|>", "<|python_tag|>"], pad="<pad>", eos="<|eot|>",
        tokenizer_class="PreTrainedTokenizerFast", extra=names,
        chat_template="{{ bos_token }}" + _chat("[{{ m.role }}]", "<|eot|>", "<|image|>", "[assistant]"),
    )  # fmt: skip
    write_json(
        out / "preprocessor_config.json",
        dict(
            _HALF, image_processor_type="MllamaImageProcessor", processor_class="MllamaProcessor", do_resize=True,
            do_convert_rgb=True, do_pad=True, max_image_tiles=4, resample=2, size=dict(height=56, width=56),
        ),
    )  # fmt: skip
    text = dict(_TEXT, num_hidden_layers=4, rope_theta=1e4, cross_attention_layers=[1, 3])
    vision = dict(
        _TOWER, image_size=56, patch_size=14, num_hidden_layers=2, num_global_layers=1, max_num_tiles=4,
        intermediate_layers_indices=[0], vision_output_dim=128, num_channels=3,
    )  # fmt: skip
    return dict(
        model_type="mllama", image_token_index=ids["<|image|>"], eos_token_id=[ids["<|eot|>"]], vocab_size=VOCAB,
        text_config=text, vision_config=vision,
    )  # fmt: skip


def _florence2(out: Path, model_type: str) -> dict[str, Any]:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>", "<loc_0>", "<florence_image>"]
    names = dict(bos_token="<s>", cls_token="<s>", sep_token="</s>", unk_token="<unk>", mask_token="<mask>")
    ids = make_tokenizer(
        out, specials=specials, tokenizer_class="PreTrainedTokenizerFast", pad="<pad>", eos="</s>", chat_template="",
        extra={**names, "image_token": "<florence_image>"},
    )  # fmt: skip
    write_json(
        out / "preprocessor_config.json",
        dict(
            _HALF, image_processor_type="CLIPImageProcessor", processor_class="Florence2Processor", do_resize=True,
            size=dict(height=64, width=64), do_center_crop=False, crop_size=dict(height=64, width=64), resample=3,
            image_seq_length=4,
        ),
    )  # fmt: skip
    vision = dict(
        model_type="davit", depths=[1, 1], dim_embed=[16, 32], num_heads=[2, 2], num_groups=[2, 2], window_size=4,
        patch_size=[7, 3], patch_stride=[8, 4], patch_padding=[3, 1], patch_prenorm=[False, True], image_size=[64, 64],
    )  # fmt: skip
    text = dict(
        model_type="florence2_language", d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=512,
        vocab_size=VOCAB, bos_token_id=ids["<s>"], pad_token_id=ids["<pad>"], eos_token_id=ids["</s>"],
        decoder_start_token_id=ids["</s>"],
    )  # fmt: skip
    return dict(
        model_type="florence2", vocab_size=VOCAB, pad_token_id=ids["<pad>"], bos_token_id=ids["<s>"],
        eos_token_id=[ids["</s>"]], image_token_id=ids["<florence_image>"], image_token_index=ids["<florence_image>"],
        text_config=text, vision_config=vision, max_position_embeddings=512,
    )  # fmt: skip


def _phi(out: Path, model_type: str) -> dict[str, Any]:
    """Phi-3-V, Phi-4-MM and Phi-4-SigLIP: their text layers are alike, their towers are not."""
    specials = ["<|endoftext|>", "<s>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    turn = "<|im_start|>{{ m.role }}\n" if model_type == "phi4-siglip" else "<|{{ m.role }}|>"
    ids = make_tokenizer(
        out, specials=specials, tokenizer_class="PreTrainedTokenizerFast", eos="<|end|>", extra={"bos_token": "<s>"},
        chat_template=_chat(turn, "<|end|>\n", "<image>", "<|assistant|>"),
    )  # fmt: skip
    write_json(
        out / "preprocessor_config.json",
        dict(_HALF, num_crops=1, num_img_tokens=144, min_num_patches=4, max_num_patches=16),
    )
    config = dict(
        _TEXT, model_type=model_type, rope_theta=1e4, eos_token_id=[ids["<|end|>"]], pad_token_id=ids["<|endoftext|>"],
        partial_rotary_factor=1.0, original_max_position_embeddings=4096, mm_hidden_size=64, max_num_patches=16,
        min_num_patches=4,
    )  # fmt: skip
    vision = dict(_TOWER, num_hidden_layers=3, patch_size=14, image_size=56)
    match model_type:
        case "phi3_v":
            return dict(config, img_processor={"name": "clip_vision_model"})
        case "phi4mm":
            audio = dict(
                attention_dim=16, attention_heads=2, num_blocks=1, linear_units=16, conv_channels=16,
                ext_pw_out_channel=16, depthwise_seperable_out_channel=16,
            )  # fmt: skip
            return dict(config, vision_config=vision, audio_processor={"config": audio}, vision_lora={"r": 4})
        case _:
            tower = "google/siglip2-so400m-patch14-naflex"
            # mlx-vlm takes the text layers' sizes from here, or else those of the published model.
            text = dict(_TEXT, rope_theta=1e4)
            del text["max_position_embeddings"]
            return dict(
                config, text_config=text, vision_config=dict(vision, num_patches=16), mm_vision_tower=tower
            )


def _moondream(out: Path, model_type: str) -> dict[str, Any]:
    # Its processor knows tokens by their ids: the first begins and ends, the fourth asks for the answer.
    specials = ["<|endoftext|>", "<|1|>", "<|2|>", "<|answer|>"]
    make_tokenizer(
        out, specials=specials, tokenizer_class="PreTrainedTokenizerFast", eos="<|endoftext|>", chat_template="",
        extra={"bos_token": "<|endoftext|>"}, specials_first=True,
    )  # fmt: skip
    text = dict(
        _TEXT, model_type=model_type, num_key_value_heads=4, head_dim=16, rope_dim=8, num_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, moe_start_layer=1, num_hidden_layers=2,
    )  # fmt: skip
    vision = dict(
        _TOWER, num_hidden_layers=1, patch_size=14, crop_size=378, max_crops=2, proj_inner_dim=64, proj_out_dim=64
    )
    return dict(model_type=model_type, text_config=text, vision_config=vision, eos_token_id=0, bos_token_id=0)


def _aya_vision(out: Path, model_type: str) -> dict[str, Any]:
    specials = ["<pad>", "<bos>", "<|end|>", "<image>", "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"]
    ids = make_tokenizer(
        out, specials=specials, tokenizer_class="PreTrainedTokenizerFast", pad="<pad>", eos="<|end|>",
        chat_template="<bos>" + _chat("[{{ m.role }}]", "<|end|>", "<image>", "[assistant]"),
        extra={"bos_token": "<bos>"},
    )  # fmt: skip
    write_json(
        out / "preprocessor_config.json",
        dict(
            _HALF, image_processor_type="GotOcr2ImageProcessor", processor_class="AyaVisionProcessor", do_resize=True,
            size=dict(height=56, width=56), crop_to_patches=True, min_patches=1, max_patches=4,
        ),
    )  # fmt: skip
    write_json(
        out / "processor_config.json",
        dict(processor_class="AyaVisionProcessor", patch_size=14, img_size=56, downsample_factor=2),
    )
    text = dict(
        _TEXT, model_type="cohere2", head_dim=16, sliding_window=24, sliding_window_pattern=3, layer_norm_eps=1e-5,
        rope_theta=1e4, logit_scale=1.0,
    )  # fmt: skip
    return dict(
        model_type=model_type, image_token_index=ids["<|IMG_PATCH|>"], downsample_factor=2, vocab_size=VOCAB,
        alignment_intermediate_size=128, eos_token_id=[ids["<|end|>"]], text_config=text,
        vision_config=dict(
            _TOWER, model_type="siglip_vision_model", num_hidden_layers=2, patch_size=14, image_size=56
        ),
    )  # fmt: skip


VLM = {
    "qwen3_vl": _qwen3,
    "qwen3_vl_moe": _qwen3,
    "qwen3_5": _qwen3,
    "qwen2_5_vl": _qwen2,
    "qwen2_vl": _qwen2,
    "gemma3": _gemma3,
    "smolvlm": _idefics,
    "idefics3": _idefics,
    "llava": _llava,
    "llava_next": _llava,
    "llava_onevision": _llava,
    "mistral3": _mistral3,
    "pixtral": _mistral3,
    "internvl_chat": _internvl,
    "internvl": _internvl,
    "gemma4": _gemma4,
}


# Models whose prompts are read whole; `tests/models/test_whole.py`.
WHOLE = {
    "paligemma": _paligemma,
    "mllama": _mllama,
    "florence2": _florence2,
    "phi3_v": _phi,
    "phi4mm": _phi,
    "phi4-siglip": _phi,
    "moondream2": _moondream,
    "moondream3": _moondream,
}
# Models without a family file; `tests/models/test_generic.py`.
UNKNOWN = {"aya_vision": _aya_vision}
# Models that hear; `tests/models/test_sound.py`.
HEARING = {"gemma4_audio": _gemma4}

# The text builder owns the name "qwen3_5".
VLM_NAMES = tuple(f"{name}_mm" if name == "qwen3_5" else name for name in VLM)


def build_vlm(name: str, out: Path) -> None:
    from mlx_vlm.utils import get_model_and_args, update_module_configs

    model_type = name.removesuffix("_mm")
    config = {**VLM, **WHOLE, **UNKNOWN, **HEARING}[model_type](out, model_type)
    write_json(out / "config.json", config)
    full = json.loads(json.dumps(config))
    full.setdefault("text_config", full.pop("llm_config", {}))
    for part in ("text_config", "vision_config", "audio_config"):
        full.setdefault(part, {})
    module, _ = get_model_and_args(config=full)
    model_config = module.ModelConfig.from_dict(full)
    model_config = update_module_configs(
        model_config, module, full, ["text", "vision", "perceiver", "projector", "audio"]
    )
    mx.random.seed(1)
    model = module.Model(model_config)
    randomize(model)
    model.load_weights(_balanced(model_type, dict(tree_flatten(model.parameters()))), strict=False)
    save_weights(model, out, "float32")


def _balanced(model_type: str, weights: dict[str, mx.array]) -> list[tuple[str, mx.array]]:
    """Changed weights where a picture would else say nothing (gates are made shut), or drown the words."""
    match model_type:
        case "mllama":
            return [(k, mx.full(w.shape, 0.3)) for k, w in weights.items() if k.endswith("gate")]
        case "florence2":
            return [(k, 0.2 * w) for k, w in weights.items() if ".encoder_attn.out_proj" in k]
        case _:
            return []


def picture(seed: int = 0, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A small picture of random blocks, different for each seed."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)
