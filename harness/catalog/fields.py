"""Reading a configuration file honestly: which fields were understood, which are known not to matter, and which are neither."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from klab.kernels.errors import UsageError

# Fields that change no shape of an operator, by what they are about. Matched in full.
_IRRELEVANT = {
    "names and tooling": r"_.* | architectures | auto_map | model_type | transformers_version | transformers\.js_config | library_name"
    r" | unsloth.* | (tokenizer|processor)_class | feature_extractor_type | name_or_path | problem_type | finetuning_task | pruned_heads"
    r" | task_specific_params | for_llm_compressor | id2label | label2id | num_labels | classifier.* | summary_.* | torchscript"
    r" | tf_legacy_loss",
    "pictures (the tower itself is reported)": r"vision_feature_.* | image_(seq_length|grid_pinpoints|size) | mm_tokens_per_image"
    r" | spatial_merge_size | (multimodal_)?projector_hidden_act",
    "tokens": r".*_token_ids? | .*_token_index | .*_id | (boi|eoi|bos|eos|pad|unk|sep)_.* | (image|video|audio|vision|mm)_.*token.*",
    "training": r".*(dropout|layerdrop).* | .*drop_(rate|path).* | .*_pdrop | .*initializer.* | .*_init(_std)? | .*init_method.* | init_std"
    r" | .*aux_loss.* | .*z_loss.* | seq_aux | gradient_checkpointing | mask_.*(prob|length|masks) | apply_spec_augment"
    r" | use_weighted_layer_sum | ep_size | pretraining_tp | (tensor|pipeline)_parallel.*",
    "generation": r"return_dict.* | output_(hidden_states|attentions|scores|past|router_logits) | use_(bfloat16|cache|return_dict|fast_.*)"
    r" | do_sample | is_(decoder|encoder_decoder) | add_(cross_attention|pooling_layer) | chunk_size_feed_forward | (max|min)_length"
    r" | max_new_tokens | early_stopping | num_beams | num_beam_groups | diversity_penalty | temperature | top_[pk] | typical_p | prefix"
    r" | .*repetition_penalty | length_penalty | .*no_repeat_ngram_size | bad_words_ids | num_return_sequences | forced_.*"
    r" | remove_invalid_values | exponential_decay_length_penalty | (begin_)?suppress_tokens(_at_begin)? | cache_implementation"
    r" | median_filter_width",
    "positions": r"rope_.* | .*rope.*(theta|scaling|type|parameters|base.*|interleave.*) | rotary.* | .*partial_rotary_factor | .*mrope.*"
    r" | position_embedding_type | max_seq(uence)?_len(gth)? | n_positions | n_ctx | seq_length | model_max_length | initial_context_length"
    r" | original_max_position_embeddings | axes_dims_rope | attn_temperature_tuning | attn_scale | floor_scale",
    "element-wise": r".*_eps(ilon)? | eps | .*_bias | bias | use_bias.* | no_bias | .*layer_?norm.* | norm_type | rms_norm.* | pre_norm"
    r" | post_norm | hidden_act(ivation)? | activation(_function|_type)? | .*_act(_fn|ivation)? | clip_qkv | query_pre_attn_scalar"
    r" | .*multiplier | .*_scal(e|ar|ing)(_factor)? | scale_(embedding|depth|emb|attn.*) | final_logit_softcapping | use_qkv_bias"
    r" | swiglu_.* | qk_norm_type | use_gemma_norm | type_vocab_size | parallel_attn | (use_)?parallel_residual",
    "how experts are scored": r"norm_top_?k_prob | scoring_func | topk_(method|group) | n_group | .*routed_scaling_factor"
    r" | use_routing_bias | (moe_)?router_(jitter|bias|dtype|scale|scaling|temperature|use|enable|score|act).*",
    "diffusion": r"guidance_embeds | sample_size | cross_attn_norm",
}
IRRELEVANT = re.compile(" | ".join(_IRRELEVANT.values()), re.VERBOSE)
# A field like this that is not understood probably changes what is computed.
SUSPICIOUS = re.compile(
    r".*(mamba|ssm|rwkv|conv|hyena|kda|retention|layer|block|head|expert|moe|attn|attention|attend|mlp|ffn|lora|rank|hidden|dim|size|"
    r"window|sparse|index|num_|n_|depth|width|adapter|loop|recur|memory).*"
)

_MISSING = object()
# No size of a model comes near; what does is damaged, and its products would overflow.
LARGEST = 2**40


class Fields:
    """A configuration's fields, remembering which were asked for. `where` names the file in messages."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where
        self.understood: set[str] = set()

    def has(self, *names: str) -> bool:
        """Whether any of these is there and not null; all of them count as understood."""
        self.understood.update(names)
        return any(self.data.get(name) is not None for name in names)

    def value(self, *names: str, default: Any = None) -> Any:
        """The first of these names that is there and not null, else `default`; all of them count as understood."""
        self.understood.update(names)
        return next((self.data[name] for name in names if self.data.get(name) is not None), default)

    def integer(self, *names: str, default: int | None = None, least: int = 1) -> int:
        """A whole number under any of these names; UsageError names the field when it is missing (and has no default) or wrong."""
        value = self.value(*names, default=_MISSING)
        if value is _MISSING:
            if default is None:
                others = f" (or {', '.join(names[1:])})" if names[1:] else ""
                raise UsageError(f"{self.where}: the field {names[0]}{others} is missing, and klab needs it for the shapes of the model")
            return default
        name = next(name for name in names if self.data.get(name) is not None)
        if isinstance(value, list) and value and all(entry == value[0] for entry in value):
            value = value[0]  # one entry per layer, all alike
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= LARGEST or value != int(value):
            raise UsageError(f"{self.where}: {name} is {value!r}; it must be a whole number of at least {least} (and below 2^40)")
        return int(value)

    def flag(self, *names: str, default: bool = False) -> bool:
        """True or false under any of these names."""
        return bool(self.value(*names, default=default))

    def sequence(self, name: str, length: int) -> list[Any] | None:
        """A list with one entry per layer, or None when the field is absent; UsageError when its length is another."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < length:
            count = len(value) if isinstance(value, list) else repr(value)
            raise UsageError(f"{self.where}: {name} has {count} entries for {length} layers")
        return value[:length]

    def left_over(self) -> Iterator[tuple[str, bool]]:
        """Fields that were neither asked for nor known not to matter, each with whether it probably changes the computation."""
        for name, value in self.data.items():
            if name in self.understood or IRRELEVANT.fullmatch(name):
                continue
            # A feature that is switched off changes nothing: null, false, zero, empty.
            yield name, bool(value) and bool(SUSPICIOUS.fullmatch(name))
