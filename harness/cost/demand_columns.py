"""The columns of a demand's CSV file, apart from what reads them: help texts need no models."""

from __future__ import annotations

COLUMNS = {
    "model": "a model's name, or a path to its config.json",
    "tokens_per_day": "prompt and generated tokens of all requests of an average day, cached ones included",
    "requests_per_s": "average requests per second (instead of tokens_per_day)",
    "isl": "prompt tokens of a request",
    "osl": "generated tokens of a request",
    "growth_per_month": "share by which demand grows every month: 0.1 is 10%, default 0",
    "peak_over_average": "busiest hour over the average, at least 1, default 1; an offline row is sized for its average",
    "name": "what to call the row, default the model",
    "slo_ttft": "time to the first token: 2s, 500ms; not for an offline row",
    "slo_tpot": "time per further token: 25ms; not for an offline row",
    "prefix_hit": "share of prompt tokens found in the cache",
    "offline": "yes for batch work without latencies",
    "quantization": "format of the weights: fp8_block, ...; none for wide ones; default: as the checkpoint is stored",
    "kv_dtype": "fp8 for a cache of 8 bits",
    "tp": "GPUs per replica; default: all sizes of --tp compete",
    "expert_parallel": "yes to spread whole experts over the GPUs of a replica",
    "sell_input": "what a million prompt tokens are sold for, $",
    "sell_output": "what a million generated tokens are sold for, $",
    "draft_tokens": "tokens speculated per step",
    "acceptance": "probability that one is accepted, default 0.7 (a guess)",
}
