"""Encoders, and encoder-decoders, of text."""

from __future__ import annotations

from support.architectures.architecture import Architecture
from support.architectures.inputs import text_for_both
from support.architectures.settings import ENCODER, TOKENS

ENCODERS = (
    Architecture("bert", "encoder", "BertForMaskedLM", "BertConfig", ENCODER, generates=False),
    Architecture(
        "bert-new-head",
        "encoder",
        "BertForMaskedLM",
        "BertConfig",
        ENCODER,
        generates=False,
        loaded="BertForSequenceClassification",
    ),
    Architecture("roberta", "encoder", "RobertaForMaskedLM", "RobertaConfig", ENCODER, generates=False),
    Architecture(
        "modernbert",
        "encoder",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {**ENCODER, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
        generates=False,
        stored="bfloat16",
    ),
    Architecture(
        "deberta-v2",
        "encoder",
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16},
        generates=False,
    ),
    Architecture(
        "distilbert",
        "encoder",
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {**TOKENS, "dim": 128, "hidden_dim": 192, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128},
        generates=False,
    ),
    Architecture(
        "albert",
        "encoder",
        "AlbertForMaskedLM",
        "AlbertConfig",
        {**ENCODER, "embedding_size": 64},
        generates=False,
        stored="bfloat16",
    ),
    Architecture(
        "t5",
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **TOKENS,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 192,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        inputs=text_for_both,
    ),
    Architecture(
        "bart",
        "encoder-decoder",
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **TOKENS,
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 192,
            "decoder_ffn_dim": 192,
            "max_position_embeddings": 128,
            "decoder_start_token_id": 2,
        },
        inputs=text_for_both,
    ),
)
