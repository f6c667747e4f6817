"""Hessian sums against plain float64 loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alphaquant.solver import Backend, HessianSum, native
from alphaquant.solver.hessian import EvidenceSum

EXPERTS, TOKENS, SIZE = 6, 200, 24
each_power = pytest.mark.parametrize("power", [0.0, 1.0, 2.0])


class Routed:
    """Tokens with two experts each, as a router would hand them out; expert 2 gets one token, expert 4 none."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(TOKENS, SIZE, generator=generator) * (torch.rand(SIZE, generator=generator) + 0.1)
        self.x_TI = (x + 0.3).to(dtype)
        logits = torch.randn(TOKENS, EXPERTS, generator=generator)
        logits[:, 4] = -torch.inf
        logits[:, 2] = -torch.inf
        logits[17, 2] = 5.0
        self.score_TK, self.ids_TK = logits.softmax(-1).topk(2)

    def rows(self) -> tuple[Tensor, list[int], Tensor]:
        """Rows sorted by expert, how many each has, and their scores in the same order."""
        order = self.ids_TK.flatten().argsort(stable=True)
        counts = self.ids_TK.flatten().bincount(minlength=EXPERTS).tolist()
        return self.x_TI[order // 2], counts, self.score_TK.flatten()[order]

    def truth(self, expert: int, power: float) -> tuple[Tensor, list[float]]:
        """The sum, and every token's score, token by token in the expert's own order."""
        h = torch.zeros(SIZE, SIZE, dtype=torch.float64)
        scores = []
        for token in range(TOKENS):
            for k in range(2):
                if int(self.ids_TK[token, k]) == expert:
                    scores.append(float(self.score_TK[token, k]))
                    x = self.x_TI[token].double()
                    h += scores[-1] ** power * torch.outer(x, x)
        return h, scores


def collected(routed: Routed, power: float) -> HessianSum:
    total = HessianSum(EXPERTS, SIZE, power)
    total.add(*routed.rows())
    return total


def relative_to_diagonal(found: Tensor, truth: Tensor) -> float:
    """The largest error of an entry, in units of the geometric mean of its two diagonal entries."""
    root = truth.diagonal().sqrt()
    return float(((found.double() - truth).abs() / (root[:, None] * root)).max())


@each_power
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_original_has_is_summed_beside(power: float, dtype: torch.dtype) -> None:
    """`(x₀ - x)ᵀ x` of an expert's own tokens, in one part or in several; the Hessian is as without it."""
    routed, other = Routed(dtype), Routed(dtype, seed=1)
    original_TI = routed.x_TI + 0.1 * other.x_TI
    order = routed.ids_TK.flatten().argsort(stable=True)
    x_RI, counts, score_R = routed.rows()
    original_RI = original_TI[order // 2]
    whole = HessianSum(EXPERTS, SIZE, power, pairs=True)
    whole.add(x_RI, counts, score_R, original_RI)
    assert whole.sum_EII.equal(collected(routed, power).sum_EII)
    parts = HessianSum(EXPERTS, SIZE, power, pairs=True)
    expert_R = routed.ids_TK.flatten()[order]
    for is_first in (torch.arange(len(order)) % 2 == 0, torch.arange(len(order)) % 2 == 1):
        some = expert_R[is_first].bincount(minlength=EXPERTS).tolist()
        parts.add(x_RI[is_first], some, score_R[is_first], original_RI[is_first])
    chosen = [5, 0, 4]
    found, in_parts = whole.shift(chosen), parts.shift(chosen)
    assert found is not None
    assert in_parts is not None
    tolerance = 1e-5 if dtype is torch.float32 else 5e-3
    for place, expert in enumerate(chosen):
        truth, total = torch.zeros(SIZE, SIZE, dtype=torch.float64), 0.0
        for row in (expert_R == expert).nonzero()[:, 0].tolist():
            weight = float(score_R[row]) ** power
            x, original = x_RI[row].double(), original_RI[row].double()
            truth += weight * torch.outer(original - x, x)
            total += weight
        truth /= max(total, 1e-30)
        scale = float(truth.abs().max()) or 1.0
        assert float((found[place].double() - truth).abs().max()) < tolerance * scale
        assert float((in_parts[place].double() - truth).abs().max()) < tolerance * scale
    assert found[2].equal(torch.zeros(SIZE, SIZE)), "it saw nothing"
    assert collected(routed, power).shift([0]) is None


@pytest.mark.skipif(not native.has_tiles(), reason="no AMX")
@pytest.mark.parametrize("weighted", [False, True])
def test_tiles_sum_what_the_original_has(*, weighted: bool) -> None:
    counts, size = [300, 0, 1, 33, 700], 96
    generator = torch.Generator().manual_seed(2)
    x_RI = torch.randn(sum(counts), size, generator=generator).bfloat16()
    original_RI = (x_RI + 0.1 * torch.randn(x_RI.shape, generator=generator)).bfloat16()
    score_R = torch.rand(len(x_RI), generator=generator) if weighted else None
    found = []
    for backend in (Backend.NATIVE, Backend.TORCH):
        total = HessianSum(len(counts), size, 1.0, backend=backend, pairs=True)
        total.add(x_RI, counts, score_R, original_RI)
        found.append(total.shift([0, 1, 2, 3, 4]))
    tiles, plain = found
    assert bool(((tiles - plain).abs().amax((1, 2)) <= 5e-3 * plain.abs().amax((1, 2))).all())


@each_power
def test_sums_weights_and_evidence_follow_the_experts_own_tokens(power: float) -> None:
    routed = Routed()
    total = collected(routed, power)
    evidence = total.evidence
    mean = total.normalized()
    assert mean.dtype == torch.float32
    for expert in range(EXPERTS):
        truth, scores = routed.truth(expert, power)
        assert int(evidence.tokens_E[expert]) == len(scores)
        assert float(evidence.score_mass_E[expert]) == pytest.approx(sum(scores), rel=1e-6)
        if not scores:
            assert float(evidence.effective_E[expert]) == 0
            assert mean[expert].equal(torch.zeros(SIZE, SIZE))
            continue
        weights = [score**power for score in scores]
        effective = sum(weights) ** 2 / sum(weight**2 for weight in weights)
        assert float(evidence.effective_E[expert]) == pytest.approx(effective, rel=1e-5)
        assert relative_to_diagonal(total.sum_EII[expert], truth) < 1e-5
        assert relative_to_diagonal(mean[expert], truth / sum(weights)) < 1e-5
    assert int(evidence.tokens_E[2]) == 1
    assert int(evidence.tokens_E[4]) == 0
    assert int(evidence.tokens_E.sum()) == 2 * TOKENS


def test_scores_in_another_order_give_another_hessian() -> None:
    # the trap of MoEQuant on DeepSeek: this is how the test above would notice
    x, counts, score = Routed().rows()
    right, wrong = HessianSum(EXPERTS, SIZE, 1.0), HessianSum(EXPERTS, SIZE, 1.0)
    right.add(x, counts, score)
    wrong.add(x, counts, score.flip(0))
    assert not torch.allclose(right.sum_EII, wrong.sum_EII, rtol=1e-2)


@each_power
def test_parts_add_up(power: float) -> None:
    routed = Routed()
    x, counts, score = routed.rows()
    at_once, in_parts = collected(routed, power), HessianSum(EXPERTS, SIZE, power)
    owner = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
    for part in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).chunk(7):
        rows = part.sort().values
        in_parts.add(x[rows], owner[rows].bincount(minlength=EXPERTS).tolist(), score[rows])
    torch.testing.assert_close(in_parts.sum_EII, at_once.sum_EII, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(in_parts.normalized(), at_once.normalized(), rtol=1e-5, atol=1e-5)
    for a, b in zip(in_parts.evidence, at_once.evidence, strict=True):
        torch.testing.assert_close(a, b)


@each_power
def test_without_scores_every_row_weighs_one(power: float) -> None:
    x = Routed().x_TI
    total = HessianSum(1, SIZE, power)
    total.add(x)
    total.add(x[:1])
    truth = x.double().T @ x.double() + torch.outer(x[0].double(), x[0].double())
    assert relative_to_diagonal(total.sum_EII[0], truth) < 1e-5
    assert relative_to_diagonal(total.normalized()[0], truth / (TOKENS + 1)) < 1e-5
    assert [float(value) for value in total.evidence] == [TOKENS + 1] * 3


def test_a_token_of_score_zero_counts_for_power_zero_only() -> None:
    x = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
    for power, expected in ((0.0, 2.0), (1.0, 1.0), (2.0, 1.0)):
        total = HessianSum(1, SIZE, power)
        total.add(x, [2], torch.tensor([1.0, 0.0]))
        assert float(total.evidence.effective_E) == pytest.approx(expected)
        assert total.normalized().isfinite().all()


def test_one_token_of_one_expert() -> None:
    # a squeeze() here corrupted others' Hessians
    x = torch.randn(1, SIZE, generator=torch.Generator().manual_seed(0))
    total = HessianSum(3, SIZE, 1.0)
    total.add(x, [0, 1, 0], torch.tensor([0.25]))
    torch.testing.assert_close(total.normalized()[1], torch.outer(x[0], x[0]))
    assert total.normalized()[[0, 2]].equal(torch.zeros(2, SIZE, SIZE))
    assert total.evidence.tokens_E.tolist() == [0, 1, 0]
    assert total.evidence.effective_E.tolist() == pytest.approx([0, 1, 0])


def test_nothing_at_all() -> None:
    total = HessianSum(3, SIZE, 1.0)
    total.add(torch.empty(0, SIZE), [0, 0, 0], torch.empty(0))
    assert total.normalized().equal(torch.zeros(3, SIZE, SIZE))
    for value in total.evidence:
        assert value.tolist() == [0, 0, 0]


@each_power
def test_evidence_alone_is_that_of_the_sum_and_hands_back_the_weights(power: float) -> None:
    routed = Routed()
    _, counts, score = routed.rows()
    alone = EvidenceSum(EXPERTS, power)
    weight = alone.add(counts, score)
    torch.testing.assert_close(weight, score**power)
    for a, b in zip(alone.evidence, collected(routed, power).evidence, strict=True):
        torch.testing.assert_close(a, b)
    assert alone.add([3, *[0] * (EXPERTS - 1)], None) is None
    assert int(alone.evidence.tokens_E[0]) == counts[0] + 3


def test_normalising_and_adding_change_no_input() -> None:
    x, counts, score = Routed().rows()
    total = HessianSum(EXPERTS, SIZE, 2.0)
    x_before, score_before = x.clone(), score.clone()
    total.add(x, counts, score)
    sums, evidence = total.sum_EII.clone(), [value.clone() for value in total.evidence]
    total.normalized().zero_()
    total.evidence.tokens_E.zero_()
    assert x.equal(x_before)
    assert score.equal(score_before)
    assert total.sum_EII.equal(sums)
    assert all(a.equal(b) for a, b in zip(total.evidence, evidence, strict=True))


@each_power
def test_bf16_inputs_stay_within_a_percent_and_positive(power: float) -> None:
    routed = Routed(torch.bfloat16)
    total = collected(routed, power)
    for expert in (0, 1, 3, 5):
        truth, _ = routed.truth(expert, power)
        found = total.sum_EII[expert].double()
        assert relative_to_diagonal(found, truth) < (1e-5 if power == 0 else 1e-2)
        torch.testing.assert_close(found, found.T, rtol=1e-5, atol=1e-5)
        assert float(torch.linalg.eigvalsh(found)[0]) > -1e-5 * float(found.trace())


def test_bf16_inputs_without_scores_are_exact() -> None:
    x = (torch.randn(3000, 160, generator=torch.Generator().manual_seed(0)) + 0.5).bfloat16()
    total = HessianSum(1, 160, 1.0)
    for part in x.split(700):
        total.add(part)
    assert relative_to_diagonal(total.sum_EII[0], x.double().T @ x.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_scored", [True, False])
def test_any_number_of_rows(is_scored: bool, dtype: torch.dtype) -> None:  # noqa: FBT001
    # products take rows in blocks: numbers of rows below, at and above a block's
    counts = [300, 0, 1, 255, 256, 257]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts), SIZE, generator=generator).to(dtype)
    score = torch.rand(sum(counts), generator=generator) if is_scored else None
    total = HessianSum(len(counts), SIZE, 1.0)
    for _ in range(2):
        total.add(x, counts, score)
    weight = torch.ones(sum(counts)) if score is None else score
    parts = zip(x.double().split(counts), weight.double().split(counts), strict=True)
    truth = torch.stack([rows.T @ (rows * weights[:, None]) for rows, weights in parts]) * 2
    tolerance = 1e-5 if dtype is torch.float32 or not is_scored else 1e-2
    for expert in (0, 2, 3, 4, 5):
        assert relative_to_diagonal(total.sum_EII[expert], truth[expert]) < tolerance
    assert total.sum_EII[1].abs().max() == 0
    assert total.evidence.tokens_E.tolist() == [2 * count for count in counts]


def test_bf16_inputs_leave_the_matmul_precision_as_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    total = HessianSum(1, SIZE, 1.0)
    total.add(torch.ones(4, SIZE, dtype=torch.bfloat16))
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(RuntimeError):
        total.add(torch.ones(4, SIZE + 1, dtype=torch.bfloat16))
    assert torch.get_float32_matmul_precision() == before


def test_fp32_inputs_are_not_rounded_to_bf16() -> None:
    x = torch.full((1, SIZE), 1 + 2.0**-12)
    total = HessianSum(1, SIZE, 0.0)
    total.add(x)
    torch.testing.assert_close(total.sum_EII[0], torch.full((SIZE, SIZE), (1 + 2.0**-12) ** 2), rtol=1e-7, atol=0)
