"""Model selection: the most accurate student that fits a device, with the reason for each."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from .device_profile import DeviceProfile, Limits, StudentCost
from .errors import ConfigError
from .students import INT8_SUFFIX, PROFILES, measured_accuracy


@dataclass(frozen=True)
class Verdict:
    """Why a student was taken or not.

    Attributes:
        cost: at the number of threads that is fastest within the memory limit; None: not measured on the device.
        accuracy: customized, mean over the data sets of `edgefm bench students`; None: never measured.
    """

    student: str
    cost: StudentCost | None
    accuracy: float | None
    fits: bool
    reason: str


@dataclass(frozen=True)
class Selection:
    """The verdict on every student, and the cost of the one that was taken; None if none fits."""

    limits: Limits
    taken: StudentCost | None
    verdicts: tuple[Verdict, ...]

    def require(self, device: str) -> StudentCost:
        """Raises `ConfigError` if none fits, with the reason for each."""
        if self.taken is None:
            reasons = "; ".join(f"{verdict.student}: {verdict.reason}" for verdict in self.verdicts)
            raise ConfigError(f"no student fits {self.limits} on {device}: {reasons}")
        return self.taken


def select_student(profile: DeviceProfile, limits: Limits) -> Selection:
    """The most accurate student that keeps both limits; of equally accurate ones the faster.

    A quantised one is of use only where it is faster than the same student that is not.
    """
    judged = [_judge(name, profile, limits) for name in PROFILES]
    fitting = [(verdict, verdict.cost) for verdict in judged if verdict.fits and verdict.cost is not None]
    if not fitting:
        return Selection(limits, None, tuple(judged))
    best, taken = max(fitting, key=lambda pair: (pair[0].accuracy or 0.0, -pair[1].frame_ms))
    verdicts = []
    for verdict in judged:
        if verdict is best:
            reason = "taken: the most accurate that fits"
        elif verdict.fits:
            more = "more accurate" if verdict.accuracy != best.accuracy else "as accurate and faster"
            reason = f"fits; {best.student} is {more}"
        else:
            reason = verdict.reason
        verdicts.append(Verdict(verdict.student, verdict.cost, verdict.accuracy, verdict.fits, reason))
    return Selection(limits, taken, tuple(verdicts))


def _judge(name: str, profile: DeviceProfile, limits: Limits) -> Verdict:
    measured = measured_accuracy(name)
    accuracy = fmean(result.customized for result in measured) if measured else None
    costs = [cost for cost in profile.students if cost.student == name]
    if not costs:
        return Verdict(name, None, accuracy, False, "not measured on this device")
    small = [cost for cost in costs if limits.memory_mb is None or cost.peak_rss_mb <= limits.memory_mb]
    cost = min(small or costs, key=lambda cost: (cost.frame_ms, cost.threads))
    if accuracy is None:
        return Verdict(name, cost, None, False, "its accuracy was never measured")
    if not small:
        least = min(cost.peak_rss_mb for cost in costs)
        return Verdict(name, cost, accuracy, False, f"too large: {least:.0f} MB of {limits.memory_mb:g}")
    if limits.latency_ms is not None and cost.frame_ms > limits.latency_ms:
        return Verdict(name, cost, accuracy, False, f"too slow: {cost.frame_ms:.2f} ms of {limits.latency_ms:g}")
    if PROFILES[name].int8:
        in_float = name.removesuffix(INT8_SUFFIX)
        float_ms = [other.frame_ms for other in profile.students if other.student == in_float]
        if float_ms and cost.frame_ms >= min(float_ms):
            return Verdict(name, cost, accuracy, False, f"no faster here than {in_float}: {min(float_ms):.2f} ms")
    return Verdict(name, cost, accuracy, True, "fits")
