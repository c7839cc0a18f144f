"""`cellstack serve`: models behind a port, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import signal
import ssl
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellstack.cli.files import add_load_options, load_options, loaded
from cellstack.formats.files import existing_file
from cellstack.train.checks import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cellstack.serve.server import ServerSettings

TOKEN = "CELLSTACK_TOKEN"  # of the environment


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `serve`."""
    parser.add_argument("models", metavar="MODEL", nargs="+", help="a network in any supported format")
    group = parser.add_argument_group("addresses")
    text = "address to listen on; 0.0.0.0 for other machines too (default: %(default)s)"
    group.add_argument("--host", default="127.0.0.1", help=text)
    group.add_argument("--port", type=int, default=8080, metavar="P", help="port (default: %(default)s; 0: any free)")
    group.add_argument("--tls-cert", metavar="FILE", help="certificate (PEM); serves HTTPS")
    group.add_argument("--tls-key", metavar="FILE", help="key of the certificate (PEM)")
    text = f"require this token, or one of the lines of this file (default: the environment variable {TOKEN}, if set)"
    group.add_argument("--token", metavar="T", help=text)
    text = "origin of pages that may also use the server, such as https://example.org; may be repeated"
    group.add_argument("--allow-origin", action="append", default=[], metavar="URL", help=text)
    text = "name of the server in requests, such as that of a proxy's site; may be repeated (default: any, but without "
    text += "a token on an address of this machine only localhost, 127.0.0.1 and [::1])"
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME", help=text)
    group = parser.add_argument_group("sessions")
    group.add_argument("--durable", metavar="FOLDER", help="continue sessions after a restart: store them in FOLDER")
    text = "open sessions per model (default: %(default)s)"
    group.add_argument("--sessions", type=int, default=10_000, metavar="N", help=text)
    text = "close sessions that were unused for this many seconds (default: %(default)s)"
    group.add_argument("--idle", type=float, default=300.0, metavar="S", help=text)
    group = parser.add_argument_group("limits")
    text = "open connections whose client has sent a valid request (default: %(default)s)"
    group.add_argument("--connections", type=int, default=10_000, metavar="N", help=text)
    text = "frames per second of a WebSocket or, over HTTP, of a session (default: no limit)"
    group.add_argument("--rate", type=float, metavar="N", help=text)
    text = "bytes of a message or request (default: %(default)s)"
    group.add_argument("--message", type=int, default=16 << 20, metavar="N", help=text)
    add_load_options(parser)


def serve(args: argparse.Namespace) -> int:
    """Serve models until a signal.

    Returns:
        0 after SIGTERM, 130 after Ctrl-C.
    """
    try:
        from cellstack.serve import Limits, ServeError
        from cellstack.serve.server import ServerSettings, prepare_process
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from None
    for name, least in (("port", 0), ("sessions", 1), ("idle", 0), ("connections", 1), ("message", 1024), ("rate", 0)):
        value = getattr(args, name)
        if value is not None and not value >= least:
            raise UsageError(f"expected --{name} of at least {least}, got {value}")
    if args.port > 65535:
        raise UsageError(f"expected --port of at most 65535, got {args.port}")
    if args.tls_key and not args.tls_cert:
        raise UsageError("--tls-key needs --tls-cert")
    if args.tls_cert:
        _check_certificate(args.tls_cert, args.tls_key)
    limits = Limits(args.sessions, args.idle, message=args.message, rate=args.rate)
    settings = ServerSettings(
        host=args.host,
        port=args.port,
        durable=Path(args.durable) if args.durable else None,
        limits=limits,
        connections=prepare_process(args.connections),
        tokens=tokens(args.token),
        allow_origins=tuple(args.allow_origin),
        allow_hosts=tuple(args.allow_host),
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        threads=args.threads or 1,
        options=load_options(args),
    )

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def listens(description: dict[str, Any]) -> None:
        if args.json:
            print(json.dumps(description), flush=True)
            return
        for model in description["models"]:
            shapes = (", ".join(map(_shown, model[kind])) for kind in ("inputs", "outputs"))
            steps = "" if model["streams"] else f"; whole sequences only: {model['why_not']}"
            say(f"{model['name']}: {' -> '.join(shapes)}{steps}")
        say(f"cellstack serve: listening on {description['url']}" + (" (token required)" * bool(settings.tokens)))

    try:
        return _run(args, settings, listens, lambda text: say(f"cellstack serve: {text}"))
    except ServeError as error:
        raise UsageError(str(error)) from None


def _run(
    args: argparse.Namespace,
    settings: ServerSettings,
    listens: Callable[[dict[str, Any]], None],
    report: Callable[[str], None],
) -> int:
    """Load the models, and serve."""
    from cellstack.serve import Models
    from cellstack.serve.server import Server, listen

    with ExitStack() as stack:
        listening = stack.enter_context(listen(settings.host, settings.port))
        models = Models(settings.limits, settings.threads, settings.options)
        for name in args.models:
            path = Path(existing_file(name))
            if path.stem in models.paths:
                raise UsageError(f"{models.paths[path.stem]} and {path} have the same name, {path.stem}")
            loaded(str(path), settings.options, partial(models.add, path))
        server = Server(models, settings, report, listens)
        server.run([listening])
        return 130 if server.signal == signal.SIGINT else 0


def _check_certificate(certificate: str, key: str | None) -> None:
    for option, file in (("cert", certificate), ("key", key)):
        if file and not Path(file).is_file():
            raise UsageError(f"--tls-{option}: {file}: no such file")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:
        needs = "" if key else "; a file without the certificate's key needs --tls-key"
        raise UsageError(f"--tls-cert: expected a certificate and its key in PEM files: {error}{needs}") from None


def tokens(given: str | None) -> tuple[str, ...]:
    """Return the tokens of --token, else of the environment."""
    if given is None:
        given = os.environ.get(TOKEN, "")
        return (given,) if given else ()
    found = tuple(Path(given).read_text().split()) if Path(given).is_file() else (given,)
    if not found or not all(found):
        raise UsageError(f"--token: expected a token, or a file with one per line, got {given!r}")
    return found


def _shown(tensor: dict[str, Any]) -> str:
    width = "id" if tensor["dtype"] == "int64" and tensor["width"] is None else f"[{tensor['width']}]"
    return f"{tensor['name']} {width} {tensor['dtype']}"
