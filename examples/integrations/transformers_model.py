"""The tiny transformers model, its data and arguments, for the examples ``transformers_*.py``.

The model is randomly initialised, so nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments


def sentences(size: int) -> list[dict[str, torch.Tensor]]:
    """Return random token sequences whose label is the parity of their first token."""
    tokens = torch.randint(0, 50, (size, 8), generator=torch.Generator().manual_seed(size))
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


def classifier(width: int) -> BertForSequenceClassification:
    """Return a tiny model."""
    config = BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
    )
    return BertForSequenceClassification(config)


def arguments(folder: str, **more: Any) -> TrainingArguments:
    """Return arguments for six steps, with an evaluation after every second one."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
