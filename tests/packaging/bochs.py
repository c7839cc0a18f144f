"""Run the kernel's driver on a processor that Bochs emulates, such as one with AVX-512, which QEMU lacks.

Bochs emulates a whole machine. It boots Linux, whose first process is init.c, from an image of a CD; files that the
programs need are in an initial RAM disk. What they print goes to the serial port, which is a file here.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

LOADER = (Path("/usr/lib/ISOLINUX/isolinux.bin"), Path("/usr/lib/syslinux/modules/bios/ldlinux.c32"))
NEEDS = {  # a file that a package of Debian installs
    "bochs": Path("/usr/bin/bochs"),
    "bochs-sdl": Path("/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_sdl2_gui.so"),
    "isolinux": LOADER[0],
    "syslinux-common": LOADER[1],
    "xorriso": Path("/usr/bin/xorriso"),
}
KERNEL = "linux-image-cloud-amd64"
SECONDS = 3600  # more than a busy machine takes; a machine that hangs ends
# Without ACPI, restarting is a triple fault, at which Bochs ends. Its Sapphire Rapids has AMX in part, which Linux
# doesn't expect.
COMMAND_LINE = (
    "initrd=/initrd console=ttyS0 loglevel=1 mitigations=off clearcpuid=amx_tile acpi=off panic=-1 reboot=triple"
)
MACHINE = """
cpu: model={model}, ips=100000000, reset_on_triple_fault=0
megs: 256
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
display_library: sdl2
speaker: enabled=0
ata0-master: type=cdrom, path="{folder}/cd.iso", status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev="{folder}/serial"
log: "{folder}/log"
panic: action=fatal
"""


class BochsError(Exception):
    """The emulated machine ended without running the program to its end; the message says what is known."""


def kernels() -> list[Path]:
    return sorted(Path("/boot").glob("vmlinuz-*"))


def missing() -> list[str]:
    """Return the packages of Debian that aren't installed."""
    return [package for package, file in NEEDS.items() if not file.exists()] + ([] if kernels() else [KERNEL])


def archive(files: Mapping[str, bytes]) -> bytes:
    """Return an initial RAM disk with these programs and a console: a cpio archive in the format "newc"."""
    entries = [("dev", 0o40755, (0, 0), b""), ("dev/console", 0o20600, (5, 1), b"")]
    entries += [(name, 0o100755, (0, 0), content) for name, content in files.items()]
    packed = bytearray()
    for inode, (name, mode, device, content) in enumerate([*entries, ("TRAILER!!!", 0, (0, 0), b"")], start=1):
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        for part in (b"070701" + b"".join(b"%08X" % field for field in fields) + path, content):
            packed += part + bytes(-len(part) % 4)
    return bytes(packed)


def build_cd(program: Path, folder: Path) -> None:
    """Write the image of a CD that boots Linux and runs the program, which must be linked statically."""
    init, root = folder / "init", folder / "root"
    root.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("init.c")
    subprocess.run([os.environ.get("CC", "cc"), "-Os", "-static", source, "-o", init], check=True)
    (root / "initrd").write_bytes(archive({"init": init.read_bytes(), "program": program.read_bytes()}))
    shutil.copyfile(kernels()[-1], root / "linux")
    for file in LOADER:
        shutil.copyfile(file, root / file.name)
    (root / "isolinux.cfg").write_text(f"default linux\nlabel linux\nkernel /linux\nappend {COMMAND_LINE}\n")
    boot = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"]
    subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", folder / "cd.iso", *boot, root], check=True)


def run(program: Path, model: str, folder: Path) -> tuple[str, int]:
    """Run the program on a model of processor; return what it printed, and its exit code as subprocess has it."""
    folder = folder.absolute()
    build_cd(program, folder)
    (folder / "machine").write_text(MACHINE.format(model=model, folder=folder))
    serial = folder / "serial"
    serial.unlink(missing_ok=True)
    with (folder / "printed").open("w") as printed:
        # no window is opened, and no sound device
        environment = os.environ | {"SDL_VIDEODRIVER": "dummy", "SDL_AUDIODRIVER": "dummy"}
        command = ["bochs", "-q", "-f", folder / "machine"]
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, env=environment, timeout=SECONDS
        )
    text = serial.read_text(errors="replace") if serial.exists() else ""
    return ended(text, folder)


def ended(serial: str, folder: Path) -> tuple[str, int]:
    """Split what the machine printed into the program's part and its exit code."""
    text = serial.replace("\r\n", "\n").replace("\r", "")
    status = re.search(r"^status (\d+)$", text, re.MULTILINE)
    if not status:
        raise BochsError(f"the emulated machine stopped; see {folder}/log. It printed: {text[-500:]!r}")
    return text[: status.start()], os.waitstatus_to_exitcode(int(status[1]))
