"""What the tests of the service's HTTP part take for the engine."""

from __future__ import annotations

from megatron_tiedlora.service.operations import ServiceFacts

FACTS = ServiceFacts(
    model_name="org/base", tokenizer_id="org/base", architecture="llama", vocab_size=100, max_length=64,
    stop_tokens=(9,), method="lora", alpha=16.0, seed=42, max_body=100_000, poll_seconds=0.3,
)  # fmt: skip
