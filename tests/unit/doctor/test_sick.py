"""Spikes by hand, and what they are not."""

import math

import pytest

from llmtrain.config.frozen import FrozenRun
from llmtrain.doctor.sick import divergence, robust_z, spikes, worst
from llmtrain.telemetry.vitals import Vitals


def row(losses: list[float], step: int, norms: list[float] | None = None) -> Vitals:
    return Vitals(
        step=step,
        tokens=100 * step,
        losses=tuple(losses),
        grad_norms=tuple(norms or [1.0] * len(losses)),
        time_utc="2026-01-02T03:04:05+00:00",
        steps_here=len(losses),
        first_of_process=False,
        seconds={"data": 0.0, "forward_backward": 1.0, "optimizer": 0.1},
        num_compiled=0,
        compile_seconds=0.0,
        compile_reasons={},
        host_syncs={},
        peak_memory_bytes=1,
    )


def test_deviations_are_median_absolute_ones_scaled_to_a_standard_deviation():
    """Of 1, 2, 3, 4, 100 the median is 3, the median absolute deviation 1: 10 lies 7 / 1.4826 above."""
    assert robust_z(10.0, [1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, pytest.approx(7 / 1.4826))
    assert robust_z(2.0, [2.0, 2.0, 2.0]) == (2.0, 0.0)
    assert robust_z(3.0, [2.0, 2.0, 2.0]) == (2.0, math.inf)


NOISE = [0.0, 0.1, -0.1, 0.05, -0.05, 0.02, 0.08, -0.02, 0.03, -0.07]


def test_a_loss_that_jumps_is_a_spike_with_its_step_and_gradient():
    losses = [3 + noise for noise in NOISE]
    rows = [row(losses, 20), row([3.0, 9.0, 9.5, 3.05, 5.0], 25, [1.0, 20.0, 30.0, 1.0, 1.0])]
    [first, second], [third] = spikes(rows)
    assert [spike.step for spike in (first, second, third)] == [22, 23, 25]
    assert (second.loss, second.grad_norm, second.usual_grad_norm) == (9.5, 30.0, 1.0)
    assert worst([first, second]) == second
    assert first.usual == pytest.approx(3.01, abs=0.011)
    assert second.usual == first.usual, "a spike is not part of what the next step is held against"


def test_a_loss_that_rises_and_stays_is_a_divergence_that_began_at_a_step(frozen: FrozenRun):
    losses = [3 + noise for noise in NOISE] + [6.0 + step for step in range(12)]
    [group] = spikes([row(losses, 22)])
    finding = divergence(group, frozen)
    assert finding.facts["first_step"] == 11
    assert finding.seen.startswith("from step 11 to 22 the loss is above what it was: 17.000 where 3.010 was usual")
    assert finding.remedies[0] == f"trainer.lr={frozen.config.trainer.lr / 2:g} (now {frozen.config.trainer.lr:g})"


@pytest.mark.parametrize(
    "losses",
    [
        [8 * 0.95**step + NOISE[step % 10] for step in range(60)],  # learning
        [3 + noise for noise in NOISE] + [1.0],  # a fall
        [3 + noise / 1000 for noise in NOISE] + [3.02],  # many deviations, but a rise of less than a twentieth
        [3.0, 9.0, 3.0, 9.0],  # too few to say anything
    ],
)
def test_these_are_no_spikes(losses: list[float]):
    assert spikes([row(losses, len(losses))]) == []
