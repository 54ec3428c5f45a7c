"""What every elastic run is given, whatever its model."""

from dataclasses import dataclass
from pathlib import Path

from elastic_gpt import devices
from elastic_gpt.settings import Device, Resume, SettingsError, Traffic, refuse_rounded


@dataclass(frozen=True)
class Plan:
    """Settings that every elastic run has, whatever its model."""

    run_dir: Path
    steps: int
    """Updates in the whole run."""
    global_batch: int
    """Sequences or examples a step, whatever the number of workers."""
    micro_batch: int
    """How many of them go through one forward pass; a divisor of global_batch."""
    seed: int = 0
    targets: int = 1
    """Targets in one of them. The gradient is that of the mean loss over all targets of the global batch."""
    device: Device = "auto"
    resume: Resume = "auto"
    clip: float = 0.0
    """Largest norm of the gradient; 0: no clipping."""
    max_skipped: int = 10
    """The run ends after so many updates in a row that are not finite."""
    exact: bool = False
    """Parameters equal bit for bit at every world size on the same kind of device. Gradients are rounded to 1.5e-11."""
    traffic: Traffic = "float32"
    """Type in which gradients travel between workers; bfloat16 is half the bytes and rounds them, so not in exact mode."""
    snapshot_interval: int = 10
    checkpoint_interval: int = 100
    checkpoint_keep: int = 2
    checkpoint_dir: str | None = None
    evaluate_interval: int = 0
    """Steps between evaluations; 0: only at the end. For a run that evaluates."""
    grace_seconds: float = 25.0
    timeout_seconds: float = 120.0
    observe_interval: int = 10
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch", "snapshot_interval", "checkpoint_interval"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.global_batch % self.micro_batch:
            raise SettingsError(f"micro_batch {self.micro_batch} does not divide global_batch {self.global_batch}")
        devices.refuse(self.device, exact=self.exact)
        refuse_rounded(self.traffic, exact=self.exact)
