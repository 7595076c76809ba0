"""PyTorch loops that do what the published codes do: the other side of the benchmarks.

Each keeps the published algorithm and drops what is accidental around it: no text round trips, no attention masks of
ones, the vocabulary's logits at the last position only, decoding under `torch.inference_mode`, and no step that waits
for a value on the host. None stops at an end-of-sequence token: all answers have `new_tokens` tokens.

Models are Hugging Face's. Shapes: B batch, P prompt, T tokens so far, N new tokens, K candidates.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, pad
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


class GuidedAnswer(NamedTuple):
    """What a guided loop chose, and from what."""

    tokens: Int[Tensor, "1 N"]
    candidates: Int[Tensor, "N K"]
    rewards: Float[Tensor, "N K"]


def last_logits(lm: PreTrainedModel, input_ids: Int[Tensor, "B T"], cache: DynamicCache | None) -> Float[Tensor, "B V"]:
    """Next-token logits in fp32, from the tokens that `cache` lacks; all tokens where there is no cache."""
    output = lm(input_ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    return output.logits[:, -1].float()


def last_rewards(rm: PreTrainedModel, input_ids: Int[Tensor, "B T"], cache: DynamicCache | None) -> Float[Tensor, " B"]:
    """The score head in fp32 at each row's last token, whatever that token is.

    The classifier's own `forward` would look for the last token that is not padding, and so misread a candidate that
    happens to be the padding token.
    """
    output = rm.base_model(input_ids, past_key_values=cache, use_cache=cache is not None)
    return rm.score(output.last_hidden_state[:, -1])[:, 0].float()


@torch.inference_mode()
def plain_sampling(
    lm: PreTrainedModel, input_ids: Int[Tensor, "B P"], new_tokens: int, k: int, generator: torch.Generator
) -> Int[Tensor, "B N"]:
    """Unguided top-k sampling with a cache: the speed that guidance is paid from."""
    cache = DynamicCache(config=lm.config)
    answer = []
    unseen = input_ids
    for _ in range(new_tokens):
        top_logits, candidates = last_logits(lm, unseen, cache).topk(k)
        choice = torch.multinomial(top_logits.softmax(-1), 1, generator=generator)
        unseen = candidates.gather(-1, choice)
        answer.append(unseen)
    return torch.cat(answer, dim=1)


@torch.inference_mode()
def args_loop(
    lm: PreTrainedModel,
    rm: PreTrainedModel,
    input_ids: Int[Tensor, "1 P"],
    new_tokens: int,
    k: int,
    weight: float,
) -> GuidedAnswer:
    """ARGS-greedy as its authors coded it: `argmax of logit + weight * reward` over the top k.

    Both models are cached, but the reward model's cache has one row a candidate. The first step fills all k rows with
    the whole prompt; each later step scores one token a row, then overwrites every row with a copy of the winner's.
    """
    lm_cache = DynamicCache(config=lm.config)
    rm_cache = DynamicCache(config=rm.config)
    steps = []
    unseen = input_ids
    for step in range(new_tokens):
        top_logits, candidates = (row[0] for row in last_logits(lm, unseen, lm_cache).topk(k))
        columns = candidates[:, None]
        rewards = last_rewards(rm, torch.cat([input_ids.expand(k, -1), columns], 1) if step == 0 else columns, rm_cache)
        choice = (top_logits + weight * rewards).argmax(keepdim=True)
        rm_cache.reorder_cache(choice.expand(k))
        unseen = candidates[choice][None]
        steps.append((unseen, candidates, rewards))
    return _answer(steps)


@torch.inference_mode()
def pargs_loop(
    lm: PreTrainedModel,
    rm: PreTrainedModel,
    input_ids: Int[Tensor, "1 P"],
    new_tokens: int,
    k: int,
    weight: float,
    generator: torch.Generator,
    *,
    greedy: bool = False,
) -> GuidedAnswer:
    """PARGS as its authors coded it: a draw from `softmax(log p + weight * reward)` over the top k, nothing cached.

    Every step runs the language model over the whole text, and the reward model over the whole text once for each
    candidate, one by one. `greedy` takes the argmax instead of a draw (PARGS-G).
    """
    steps = []
    text = input_ids
    for _ in range(new_tokens):
        top_log_probs, candidates = (row[0] for row in last_logits(lm, text, None).log_softmax(-1).topk(k))
        rewards = torch.cat([last_rewards(rm, torch.cat([text, v.view(1, 1)], dim=1), None) for v in candidates])
        scores = top_log_probs + weight * rewards
        if greedy:
            choice = scores.argmax(keepdim=True)
        else:
            choice = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        chosen = candidates[choice][None]
        text = torch.cat([text, chosen], dim=1)
        steps.append((chosen, candidates, rewards))
    return _answer(steps)


def _answer(steps: list[tuple[Int[Tensor, "1 1"], Int[Tensor, " K"], Float[Tensor, " K"]]]) -> GuidedAnswer:
    chosen, candidates, rewards = zip(*steps, strict=True)
    return GuidedAnswer(torch.cat(chosen, dim=1), torch.stack(candidates), torch.stack(rewards))


def full_sequence_loss(
    rm: PreTrainedModel, prompt: Int[Tensor, "B P"], chosen: Int[Tensor, "B C"], rejected: Int[Tensor, "B R"]
) -> Float[Tensor, ""]:
    """Bradley-Terry loss on whole answers, with its backward pass; all 2B texts are one batch.

    Gradients are added to those of `rm`; the loss returned is the mean over pairs. No argument holds padding: each has
    one length for all its rows.
    """
    whole = max(chosen.shape[1], rejected.shape[1])
    return _prefix_rows_loss(rm, prompt, chosen, rejected, [whole], micro_batch=len(prompt))


def all_prefix_rows_loss(
    rm: PreTrainedModel,
    prompt: Int[Tensor, "B P"],
    chosen: Int[Tensor, "B C"],
    rejected: Int[Tensor, "B R"],
    micro_batch: int,
) -> Float[Tensor, ""]:
    """Bradley-Terry loss on every pair of prefixes as published, with its backward pass.

    Each prefix of each answer is a row with a forward pass of its own; the shorter answer stays at its last prefix.
    `micro_batch` pairs of rows run together, shortest first: rows of like length waste next to nothing on padding.
    Gradients are added to those of `rm`; the loss returned is the mean over pairs of prefixes.
    """
    longest = max(chosen.shape[1], rejected.shape[1])
    return _prefix_rows_loss(rm, prompt, chosen, rejected, range(1, longest + 1), micro_batch)


def _prefix_rows_loss(
    rm: PreTrainedModel,
    prompt: Int[Tensor, "B P"],
    chosen: Int[Tensor, "B C"],
    rejected: Int[Tensor, "B R"],
    prefix_lengths: Sequence[int],
    micro_batch: int,
) -> Float[Tensor, ""]:
    rows = torch.tensor([(pair, length) for length in prefix_lengths for pair in range(len(prompt))])
    total = torch.zeros((), device=prompt.device)
    for part in rows.split(micro_batch):
        longest = int(part[:, 1].max())
        pairs, lengths = part.to(prompt.device).unbind(1)
        texts, ends = [], []
        for answer in (chosen, rejected):
            # Causal attention hides what lies right of a row's end, so the rest of its answer can stand as padding.
            padded = pad(answer, (0, max(0, longest - answer.shape[1])))[:, :longest]
            texts.append(torch.cat([prompt, padded], dim=1)[pairs])
            ends.append(prompt.shape[1] + lengths.clamp(max=answer.shape[1]) - 1)
        hidden = rm.base_model(torch.cat(texts), use_cache=False).last_hidden_state
        ends = torch.cat(ends)
        rewards = rm.score(hidden[torch.arange(len(ends), device=ends.device), ends])[:, 0].float()
        chosen_rewards, rejected_rewards = rewards.chunk(2)
        loss = -logsigmoid(chosen_rewards - rejected_rewards).sum() / len(rows)
        loss.backward()
        total += loss.detach()
    return total


@torch.inference_mode()
def text_guided_loop(
    lm: PreTrainedModel,
    rm: PreTrainedModel,
    lm_tokenizer: PreTrainedTokenizerBase,
    rm_tokenizer: PreTrainedTokenizerBase,
    prompt: Int[Tensor, "1 P"],
    new_tokens: int,
    k: int,
    weight: float,
) -> Int[Tensor, "1 N"]:
    """PARGS-G with an encoder of another tokenizer, as published: each candidate's text is decoded, split again as a
    sentence pair with the prompt, and read by the encoder, one by one. Neither model is cached."""
    question = lm_tokenizer.decode(prompt[0], skip_special_tokens=True)
    answer: list[int] = []
    for _ in range(new_tokens):
        text = torch.cat([prompt, torch.tensor([answer], dtype=prompt.dtype, device=prompt.device)], dim=1)
        top_log_probs, candidates = (row[0] for row in last_logits(lm, text, None).log_softmax(-1).topk(k))
        rewards = []
        for candidate in candidates.tolist():
            continuation = lm_tokenizer.decode([*answer, candidate], skip_special_tokens=True).rstrip("\ufffd")
            pair = rm_tokenizer(question, continuation, return_tensors="pt").to(prompt.device)
            rewards.append(rm(**pair).logits[0, 0])
        answer.append(int(candidates[(top_log_probs + weight * torch.stack(rewards)).argmax()]))
    return torch.tensor([answer])
