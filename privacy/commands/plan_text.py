"""The plan in plain words."""

import textwrap
from collections.abc import Iterator

from privacy.commands.plan import Plan
from privacy.commands.planning import Mechanism
from privacy.commands.secagg_cost import MaskingCost
from privacy.commands.trial import Trial

_WHO = {
    "sample": "whether any single picture is on a device (the device adds the noise; nobody else is trusted)",
    "client": "whether any single device takes part, with all its pictures (the aggregator adds the noise and is trusted)",
    "distributed": "whether any single device takes part (the devices add the noise together; nobody sees a single update)",
}

_STRENGTHS = ((1.0, "strong"), (3.0, "good"), (8.0, "moderate"), (float("inf"), "weak"))
"""In the words of common practice (Ponomareva et al. 2023, "How to DP-fy ML", section 5.2): up to 1 strong, up to 10 reasonable."""

_WIDTH, _INDENT = 120, 19 * " "

_LOSS_FREE = 0.005
"""Points of accuracy below which a trial cannot tell a difference."""


def text(plan: Plan) -> str:
    """Lines for the terminal."""
    return "\n".join(_lines(plan))


def _lines(plan: Plan) -> Iterator[str]:
    question, mechanism = plan.question, plan.mechanism
    strength = next(word for limit, word in _STRENGTHS if question.epsilon <= limit)
    yield f"Hides {_WHO[question.layer]}."
    yield (
        f"Epsilon {question.epsilon:g} is {strength}; delta {question.delta:g}. Whatever an attacker knows, the odds that they give to "
        f"it change by a factor of at most e^{question.epsilon:g}."
    )
    yield ""
    yield f"noise multiplier   {mechanism.noise_multiplier:g} (times clip norm {mechanism.clip_norm:g})"
    yield f"epsilon per round  {mechanism.epsilon_round:.3f} for one round alone; rounds compose to less than their sum:"
    spent = ", ".join(f"{value:.2f} after {number}" for number, value in mechanism.by_round.items())
    yield f"epsilon in total   {spent}"
    yield f"noise              {_loudness(mechanism)}"
    for remark in mechanism.remarks:
        yield from textwrap.wrap(remark, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    if plan.changes:
        yield ""
        yield "The same epsilon with"
        for change in plan.changes:
            yield (
                f"  {change.what:<30} needs noise multiplier {change.noise_multiplier:g} (noise {change.noise_share:.1f} times the "
                f"longest possible mean gradient instead of {mechanism.noise_share:.1f})"
            )
    yield ""
    yield from _accuracy(plan)
    if plan.masking:
        yield ""
        yield from _masking(plan.masking)
    yield from _judgement(plan)
    yield ""
    yield "Settings of the aggregator:"
    yield ""
    yield plan.toml.rstrip()


def _loudness(mechanism: Mechanism) -> str:
    return (
        f"L2 norm of about {mechanism.noise_share:.2f} clip norms on the mean of what one noisy step sums up"
    )


def _accuracy(plan: Plan) -> Iterator[str]:
    found = plan.trial
    if found is None:
        why = "no trial was wanted" if plan.question.data else "no data at hand (--data) to try it on"
        yield f"accuracy           not tried: {why}"
        return
    yield f"accuracy           {found.private:.1%} with, {found.plain:.1%} without privacy: {_cost(found)}"
    yield (
        f"                   after {found.rounds} of {plan.question.rounds} rounds, {found.devices} of {plan.question.cohort} devices, "
        f"{found.samples} samples each, on {found.tested} hold-out images; took {found.seconds:.0f} s"
    )


def _cost(found: Trial) -> str:
    lost = found.plain - found.private
    return "no loss that shows" if lost < _LOSS_FREE else f"it costs {100 * lost:.1f} points so far"


def _masking(cost: MaskingCost) -> Iterator[str]:
    yield (
        f"secure aggregation {cost.neighbours} neighbours per device, {cost.threshold} shares to recover; up to "
        f"{cost.tolerated} may vanish"
    )
    yield (
        f"                   up {_bytes(cost.up_bytes)} per device and round ({cost.up_bytes / cost.float32_bytes:.2f} of float32; masked "
        f"numbers do not compress), down {_bytes(cost.down_bytes)} besides the model"
    )
    yield (
        f"                   {1000 * cost.device_s:.0f} ms per device, {1000 * cost.aggregator_s:.0f} ms on the aggregator "
        f"({1000 * cost.aggregator_dropouts_s:.0f} ms if {cost.tolerated} vanish), CPU time of this machine; five exchanges more per round"
    )


def _judgement(plan: Plan) -> Iterator[str]:
    if plan.question.layer == "sample":
        if plan.trial is None:
            yield ""
            yield "Try it on data at hand with --data before you deploy it: accuracy decides whether it is practical."
        return
    words = {
        "practical": "Practical: the noise is small beside what the updates say.",
        "doubtful": "Doubtful: the noise is as loud as the updates. Expect a clear loss of accuracy.",
        "impractical": "Not practical: the noise drowns the updates, and the model will not learn.",
    }
    yield ""
    yield words[plan.verdict]


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} KB"  # noqa: PLR2004 - where people change units
