"""Multimodal-CoT's own part: the gated fusion of text and image, and the two-stage loop.

Zhang et al., "Multimodal Chain-of-Thought Reasoning in Language Models", arXiv 2302.00923.
With X the question (and, in stage 2, the rationale) and DETR's object features of the image:

  Eq. 1   p(Y | X_language, X_vision) = prod_i p(Y_i | X_language, X_vision, Y_<i)
  Eq. 2   H_language = LanguageEncoder(X_language)
  Eq. 3   H_vision   = W_h VisionExtractor(X_vision)
  Eq. 4   H_attn     = softmax(Q K^T / sqrt(d_k)) V,   Q = H_language,  K = V = H_vision
  Eq. 5   lambda     = sigmoid(W_l H_language + W_v H_attn)
  Eq. 6   H_fuse     = (1 - lambda) H_language + lambda H_attn

The released code has more parameters than the equations: biases in Eq. 3 and 5, and a whole
single-head nn.MultiheadAttention in Eq. 4, with projections of its own. They are kept, because the
released checkpoints need them, under their names. `gate_dense` is [W_l W_v] side by side.

The fusion has one head, no key mask and no dropout, as released.

Axes: B batch, T text length, U target length, D width, P image positions, F their width,
V vocabulary.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from model import T5, Pretrained

# ---- The fusion: equations 3 to 6 ----------------------------------------------------------------

NO_IMAGE = ("zero", "mask")  # see GatedFusion


class SingleHeadAttention(nn.Module):
    """nn.MultiheadAttention with one head, written out: the same names and initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, language: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, T, D) over an image (B, P, D) -> (B, T, D), and the attention (B, T, P)."""
        wq, wk, wv = self.in_proj_weight.chunk(3)
        bq, bk, bv = self.in_proj_bias.chunk(3)
        Q = F.linear(language, wq, bq)  # (B, T, D)
        K = F.linear(vision, wk, bk)  # (B, P, D)
        V = F.linear(vision, wv, bv)  # (B, P, D)
        # Eq. 4 (Multimodal-CoT)
        scores = Q @ K.transpose(1, 2) / math.sqrt(Q.shape[-1])  # (B, T, P)
        attention = scores.float().softmax(-1).to(V.dtype)  # (B, T, P)
        return self.out_proj(attention @ V), attention  # (B, T, D), (B, T, P)


class GatedFusion(nn.Module):
    """Eq. 3-6. `no_image`: what a problem without an image gets, whose features are all zero.

    "zero": as published. The zeros go through Eq. 3-6 like an image; `image_dense` turns them into
            its bias, so the text is mixed with one constant vector. Released weights need it.
    "mask": its gate is 0, so H_fuse = H_language.
    """

    def __init__(self, d_model: int, feature_dim: int, no_image: str = "zero") -> None:
        super().__init__()
        if no_image not in NO_IMAGE:
            raise ValueError(f"no_image is {no_image!r}; it must be one of {', '.join(NO_IMAGE)}.")
        self.no_image = no_image
        self.image_dense = nn.Linear(feature_dim, d_model)  # nn.Linear's own init, as released
        self.mha_layer = SingleHeadAttention(d_model)
        self.gate_dense = nn.Linear(2 * d_model, d_model)

    def forward(self, H_language: Tensor, image_features: Tensor) -> Tensor:
        """H_language (B, T, D), image_features (B, P, F), zeros without an image -> (B, T, D)."""
        return self.explain(H_language, image_features)[0]

    def explain(self, H_language: Tensor, image_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As forward, with the gate (B, T, D) and the attention over the image (B, T, P), which the
        report shows."""
        image_features = image_features.to(H_language.dtype)
        # Eq. 3 (Multimodal-CoT)
        H_vision = self.image_dense(image_features)  # (B, P, D)
        H_attn, attention = self.mha_layer(H_language, H_vision)  # (B, T, D), (B, T, P)
        # Eq. 5 (Multimodal-CoT)
        gate = self.gate_dense(torch.cat((H_language, H_attn), -1)).sigmoid()  # (B, T, D)
        if self.no_image == "mask":
            has_image = image_features.any(2).any(1)  # (B,)
            gate = gate * has_image[:, None, None]  # (B, T, D)
        # Eq. 6 (Multimodal-CoT)
        H_fuse = (1 - gate) * H_language + gate * H_attn  # (B, T, D)
        return H_fuse, gate, attention


# ---- A T5 that sees: equations 1 and 2 -----------------------------------------------------------


class MultimodalT5(Pretrained):
    """T5 whose encoder output is fused with image features before the decoder reads it.

    `fusion=None` is the text-only model of the paper's ablations: a plain T5. `from_pretrained`
    reads both released namings of the fusion layers; a plain T5 checkpoint gives a model without
    fusion. For a new fusion: `MultimodalT5(T5.from_pretrained(x), GatedFusion(...))`.
    """

    t5_class = T5  # for support/checkpoints/, which imports no model
    fusion_class = GatedFusion

    def __init__(self, t5: T5, fusion: GatedFusion | None = None) -> None:
        super().__init__()
        self.t5 = t5
        self.fusion = fusion

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, image_features: Tensor | None = None
    ) -> Tensor:
        """(B, T) ids and mask, (B, P, F) features -> states (B, T, D) for the decoder."""
        # Eq. 2 (Multimodal-CoT)
        H_language = self.t5.encode(input_ids, attention_mask)  # (B, T, D)
        if self.fusion is None:
            return H_language
        if image_features is None:
            raise ValueError("This model needs image_features (B, P, F), zeros without an image.")
        return self.fusion(H_language, image_features)  # (B, T, D)

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_features: Tensor | None,
        decoder_input_ids: Tensor,
    ) -> Tensor:
        """Decoder states (B, U, D) before the output layer, which the loss applies to some only."""
        memory = self.encode(input_ids, attention_mask, image_features)  # (B, T, D)
        mask_bias = self.t5.mask_bias(attention_mask)  # (B, 1, 1, T)
        return self.t5.decode_states(decoder_input_ids, memory, mask_bias)  # (B, U, D)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_features: Tensor | None,
        decoder_input_ids: Tensor,
    ) -> Tensor:
        """Teacher-forced logits (B, U, V): the factors of Eq. 1."""
        states = self.states(input_ids, attention_mask, image_features, decoder_input_ids)
        # Eq. 1 (Multimodal-CoT): softmax of these is p(Y_i | X_language, X_vision, Y_<i)
        return self.t5.head(states)  # (B, U, V)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_features: Tensor | None = None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        stop_loops: bool = False,
        on_token: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """New ids (B, <= max_new_tokens), EOS included, padded after it; greedy by default. The
        options are those of `model.decode`."""
        memory = self.encode(input_ids, attention_mask, image_features)  # (B, T, D)
        return self.t5.generate(
            input_ids,
            attention_mask,
            max_new_tokens,
            temperature,
            generator,
            stop_loops,
            on_token,
            memory,
        )  # (B, U)


# ---- The two-stage loop --------------------------------------------------------------------------

# {recipe: prompt format "source-target" of each stage}: Q question, C context, M choices,
# G generated rationale, A answer, L lecture, E solution (paper, Table 2).
RECIPES = {
    "two-stage": ("QCM-LE", "QCMG-A"),
    "two-stage-e": ("QCM-E", "QCMG-A"),  # version 2; the gold G of stage 2 still has the lecture
    "answer": ("QCM-A",),
    "reason": ("QCM-LEA",),
    "explain": ("QCM-ALE",),
}


def stage_names(recipe: str) -> tuple[str, ...]:
    """The folders of a run's models, in order; the only stage of a recipe is "answer"."""
    return ("rationale", "answer")[-len(RECIPES[recipe]) :]


@torch.inference_mode()
def generate_texts(
    model: MultimodalT5,
    batch: dict,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    on_token: Callable | None = None,
) -> dict[str, dict]:
    """Decode a `data.collate` batch: {id: {"text", "stop": "eos" or "length", "tokens"}}.

    Its labels are not used: the model never sees gold text here, unlike in the first published
    commands (see `teacher_forced_texts`). "tokens" counts EOS. `on_token` is as in `model.decode`.
    """
    model.eval()
    device = next(model.parameters()).device
    names = ("input_ids", "attention_mask", "image_features")
    inputs = {name: batch[name].to(device) for name in names if name in batch}
    new_ids = model.generate(**inputs, max_new_tokens=max_new_tokens, on_token=on_token)  # (B, U)
    eos_id = model.t5.config.eos_token_id
    results = {}
    for problem_id, ids in zip(batch["ids"], new_ids.tolist(), strict=True):
        ended = eos_id in ids
        if ended:
            ids = ids[: ids.index(eos_id)]
        results[problem_id] = {
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "stop": "eos" if ended else "length",
            "tokens": len(ids) + ended,
        }
    return results


@torch.inference_mode()
def teacher_forced_texts(model: MultimodalT5, batch: dict, tokenizer: Tokenizer) -> dict[str, str]:
    """Arg-max of logits that have read the gold target: {id: text}. NOT a prediction.

    Multimodal-CoT's first published commands used this as the rationale, on the test split too. It
    is here to show how much that inflates ROUGE-L (--teacher-forced); no stage reads it.
    """
    model.eval()
    device = next(model.parameters()).device
    names = ("input_ids", "attention_mask", "image_features", "decoder_input_ids")
    inputs = [batch[name].to(device) if name in batch else None for name in names]
    best = model(*inputs).argmax(-1).cpu()  # (B, U)
    texts = {}
    for problem_id, ids, labels in zip(batch["ids"], best, batch["labels"], strict=True):
        in_target = ids[labels != -100].tolist()  # not where the target is padded
        texts[problem_id] = tokenizer.decode(in_target, skip_special_tokens=True)
    return texts


def two_stage(
    generate_rationales: Callable[[], dict[str, dict]],
    generate_answers: Callable[[dict[str, str]], dict[str, dict]],
) -> dict[str, dict]:
    """Stage 1 writes a rationale; stage 2 reads question and rationale, and answers (section 4).

    Both functions return the dict of `generate_texts` for all problems; that of stage 2 takes
    {id: rationale}. Returns {id: {"response", "rationale", "stop", "tokens"}}: "stop" is "length"
    if either text was cut, "tokens" counts both.
    """
    rationales = generate_rationales()
    texts = {problem_id: rationale["text"] for problem_id, rationale in rationales.items()}
    results = {}
    for problem_id, answer in generate_answers(texts).items():
        rationale = rationales[problem_id]
        results[problem_id] = {
            "response": answer["text"],
            "rationale": rationale["text"],
            "stop": "length" if rationale["stop"] == "length" else answer["stop"],
            "tokens": rationale["tokens"] + answer["tokens"],
        }
    return results


if __name__ == "__main__":  # --keys and --summary, of a T5 with a fusion
    from support.checkpoints import summary

    summary.main({"t5": MultimodalT5})
