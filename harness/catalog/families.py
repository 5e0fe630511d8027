"""Facts of model families that their configuration files do not state, by `model_type` (or its beginning)."""

from __future__ import annotations

# fmt: off
# Encoders: one pass in which every token sees every other.
ENCODERS = frozenset({
    "albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "nomic_bert", "roberta",
    "xlm-roberta",
})
# One matrix up instead of gate and up.
UNGATED_MLP = ENCODERS - {"modernbert", "nomic_bert"} | {
    "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "nemotron", "nemotron_h", "opt",
    "persimmon", "phi", "starcoder2",
}
# The types whose reading is tested against a published number of parameters.
KNOWN_TYPES = frozenset({
    "bert", "bloom", "cohere", "deepseek_v2", "deepseek_v3", "deepseek_v32", "falcon", "gemma2", "gemma3", "gemma3_text", "glm",
    "glm4_moe", "gpt2", "gpt_neox", "gpt_oss", "granite", "kimi_k2", "llama", "llama4", "llama4_text", "minimax_m2", "mistral",
    "mixtral", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next", "smollm3", "stablelm", "starcoder2",
})
# fmt: on

# The MLP is four times as wide as the model where the file does not say.
FOUR_TIMES_WIDE = ("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "mpt")
# Queries and keys are normalised per head.
QK_NORM = ("qwen3", "gemma3", "olmo2", "olmo3", "exaone4")
# A gate on attention's output doubles the query projection.
OUTPUT_GATE = ("qwen3_next", "qwen3_5")
# The shared expert's output passes a gate of its own.
SHARED_GATE = ("qwen2_moe", "qwen3_next", "qwen3_5")
# The output head is its own matrix when the file does not say; transformers' base class ties it to the embedding.
UNTIED = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "deepseek", "kimi", "gpt_oss", "glm4", "phi3", "olmo", "minimax", "gpt_neox")
# Every n-th layer attends in full and the others in a window, where the file gives only the window.
SLIDING_PATTERN = {"gemma3": 6, "gemma3_text": 6, "gemma2": 2, "cohere2": 4, "gpt_oss": 2}
# Positions are learned, or a bias on the logits: queries and keys are not turned.
NOT_ROTARY = {
    "albert",
    "bert",
    "bloom",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "mpnet",
    "mpt",
    "opt",
    "roberta",
    "xlm-roberta",
}
# A learned logit per head takes part in the softmax.
SINKS = frozenset({"gpt_oss"})
# The router's scores are sigmoids, also where the file does not say.
SIGMOID_ROUTER = ("deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "minimax_m2", "llama4")
# What files call an activation -> what kernels/activation calls it.
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu", "gegelu": "gelu_tanh", "relu": "relu", "relu2": "relu2", "relu_squared": "relu2", "geglu": "gelu",
}  # fmt: skip
# A bias by distance is added to the logits.
ALIBI = ("bloom", "mpt")
