"""qcow snapshot --export and --import: internal snapshots as a chain of overlays, and back."""

from __future__ import annotations

from qcowlib.cli.common import CommandFailed, warn_of_sharing
from qcowlib.cli.opening import image_name, open_image_name
from qcowlib.cli.options import Arguments
from qcowlib.cli.progress import Progress
from qcowlib.errors import QcowError
from qcowlib.units import format_size


def run_chain(arguments: Arguments, filename: str) -> int:
    """Export or import one image."""
    for name, _ in arguments.options:
        allowed = {"export", "import", "progress", "quiet", "dry-run"}
        if arguments.has("export"):
            allowed |= {"format", "object", "image-opts", "force-share"}
        if name not in allowed:
            raise CommandFailed(f"--{name} cannot be used with --{'export' if arguments.has('export') else 'import'}")
    progress = Progress(enabled=arguments.has("progress") and not arguments.has("quiet"))
    progress.start()
    complete = False
    try:
        if arguments.has("export"):
            _export(arguments, filename, progress)
        else:
            _import(arguments, filename, progress)
        complete = True
    except CommandFailed:
        raise
    except QcowError as error:
        verb = "export" if arguments.has("export") else "import into"
        raise CommandFailed(f"Could not {verb} '{filename}': {error}") from error
    finally:
        progress.end(complete=complete)
    return 0


def _export(arguments: Arguments, filename: str, progress: Progress) -> None:
    directory = arguments.last("export") or ""
    name = image_name(arguments, filename)
    with open_image_name(name, force_share=warn_of_sharing(arguments), open_backing=True) as image:
        from qcowlib.image.qcow2 import Qcow2Image
        from qcowlib.operations.chain_export import export_chain, plan_export

        if not isinstance(image, Qcow2Image):
            raise CommandFailed(f"'{filename}' is a raw image: it has no snapshots")
        dry = arguments.has("dry-run")
        states = plan_export(image) if dry else export_chain(image, directory, progress=progress)
    if not arguments.has("quiet"):
        for state in states:
            what = "active layer" if state.snapshot is None else f"snapshot {state.snapshot.id} ({state.snapshot.name})"
            memory = "" if state.vmstate is None else f"; memory in {state.vmstate}"
            print(f"{state.file}: {what}, {format_size(state.data)} ({state.data} bytes) of data{memory}")


def _import(arguments: Arguments, filename: str, progress: Progress) -> None:
    from qcowlib.operations.chain_export import import_chain, plan_import

    chain = arguments.last("import") or ""
    if not arguments.has("dry-run"):
        import_chain(chain, filename, progress=progress)
    elif not arguments.has("quiet"):
        for layer, name, data in plan_import(chain):
            what = "active layer" if name is None else f"snapshot {name}"
            print(f"{layer}: {what}, {format_size(data)} ({data} bytes) of data")
