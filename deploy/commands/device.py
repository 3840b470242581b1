"""`edgefm device | profile | select | students`: what concerns one device, without its cloud."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...models.students import PROFILES
from ..settings import load_config, parse_size
from .options import ConfigFile, DeviceEnvironment, LatencyLimit, MemoryLimit, StateDir, extra


def rollback(
    config: ConfigFile = None,
    environment: DeviceEnvironment = None,
    state_dir: StateDir = None,
    reason: Annotated[str, typer.Option(help="Told to the cloud.")] = "rolled back by the device's operator",
) -> None:
    """Makes the previous student the running one, until a version newer than the present one comes."""
    from ...edge.config import AgentConfig
    from ...edge.local_state import LocalState, existing_state

    settings = load_config(AgentConfig, "agent", config, {"environment": environment, "state_dir": state_dir})
    with existing_state(settings.state_dir, settings.environment):
        left, taken = LocalState(settings.state_dir, settings.environment).roll_back(reason)
    typer.echo(f"{settings.environment} goes back from student version {left.version} to {taken.version}")


def purge(config: ConfigFile = None, state_dir: StateDir = None) -> None:
    """Deletes all samples that wait for upload, of every environment."""
    from ...edge.config import AgentConfig
    from ...edge.local_state import existing_state
    from ...edge.spool import DAY_S, Spool

    settings = load_config(AgentConfig, "agent", config, {"state_dir": state_dir})
    with existing_state(settings.state_dir):
        spool = Spool(settings.state_dir, settings.spool_bytes, settings.retention_days * DAY_S)
        try:
            deleted = spool.purge()
        finally:
            spool.close()
    typer.echo(f"{deleted} waiting samples deleted")


def profile(
    students: Annotated[Path, typer.Argument(help="Folder of 'edgefm students export', or an agent's state folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The profile is written here.")] = Path("device.json"),
    device: Annotated[str, typer.Option(help="A name for people. [the board or processor]")] = "",
    threads: Annotated[
        list[int] | None,
        typer.Option(help="Try so many; may be given several times. [1, 2, 4, ... and all cores]", min=1),
    ] = None,
    frame_size: Annotated[str, typer.Option(help="Of the camera, in pixels.")] = "640x480",
    runs: Annotated[int, typer.Option(help="Frames timed for each figure.", min=1)] = 100,
    fm: Annotated[
        str | None, typer.Option(help="Also measure this foundation model here (edgefm[cloud]), such as synclip.")
    ] = None,
    latency_ms: LatencyLimit = None,
    memory_mb: MemoryLimit = None,
) -> None:
    """Measures on this device what each student costs, without a cloud, and says which one fits.

    With --fm, it says too whether the foundation model itself could run here.
    """
    from rich.console import Console

    from ...edge.profiler import ProfileOptions
    from ...models.selection import select_student
    from ..device import explain, limits_of, profile_device
    from ..fm_cost import advise, measure_foundation_model

    console = Console()
    options = ProfileOptions(tuple(threads or ()), parse_size(frame_size), runs)
    limits = limits_of(latency_ms, memory_mb)
    measured = profile_device(students, device, limits, options, console)
    if fm is not None:
        with extra("cloud"), console.status(f"Measuring {fm} ..."):
            measured = measured.model_copy(update={"foundation_model": measure_foundation_model(fm, options)})
    measured.save(output)
    console.print(explain(measured, select_student(measured, limits)))
    if advice := advise(measured, limits):
        typer.echo(advice)
    typer.echo(f"Written to {output}; 'edgefm agent --student auto --device-profile {output}' runs the one taken.")


def select(
    device_profile: Annotated[Path, typer.Argument(help="From 'edgefm profile', or written by hand.")],
    latency_ms: LatencyLimit = None,
    memory_mb: MemoryLimit = None,
) -> None:
    """Says which student a device should run: the most accurate that keeps the limits, the profile's or these."""
    from rich.console import Console

    from ...models.device_profile import DeviceProfile
    from ...models.selection import select_student
    from ..device import explain, limits_of
    from ..fm_cost import advise

    measured = DeviceProfile.load(device_profile)
    selection = select_student(measured, limits_of(latency_ms, memory_mb, measured.limits))
    Console().print(explain(measured, selection))
    if advice := advise(measured, selection.limits):
        typer.echo(advice)
    selection.require(measured.device)


def export(
    folder: Annotated[Path, typer.Argument(help="Written here, some 10 MB a student; copy it to the device.")],
    student: Annotated[list[str] | None, typer.Option(help="Only this one; may be given several times.")] = None,
    fm: Annotated[str, typer.Option(help="Foundation model whose space the students map into.")] = "synclip",
) -> None:
    """Writes the graphs of the students, for 'edgefm profile' on a device that cannot build them."""
    with extra("cloud"):
        from rich.console import Console

        from ...models.foundation import load_foundation_model
        from ..export import export_students
    with Console().status("Loading the FM ...") as status:
        model = load_foundation_model(fm)
        export_students(folder, model, student or list(PROFILES), lambda name: status.update(f"Exporting {name} ..."))
