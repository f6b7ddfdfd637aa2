"""The metrics by name. Their definitions come from the tasks or from reference libraries; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.evaluation.metrics.choices import ACCURACY, ACCURACY_LOGLIKELIHOOD
from megatron_tiedlora.evaluation.metrics.exact import EXACT_MATCH, GSM8K, SQUAD, SQUAD_F1
from megatron_tiedlora.evaluation.metrics.metric import Answer, Metric
from megatron_tiedlora.evaluation.metrics.overlap import BLEU_METRIC, ROUGE_L

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (EXACT_MATCH, GSM8K, SQUAD, SQUAD_F1, ROUGE_L, BLEU_METRIC, ACCURACY, ACCURACY_LOGLIKELIHOOD)
}


def find_metric(name: str) -> Metric:
    """The metric called `name`. Raises UserError with the known names."""
    if name not in METRICS:
        raise UserError(f"metric {name!r} is unknown; the metrics are {', '.join(METRICS)}")
    return METRICS[name]


__all__ = ["METRICS", "Answer", "Metric", "find_metric"]
