"""An HTTP server of captions: `capexport serve`, or with any ASGI server

    CAPEXPORT_MODEL=artifacts/first uvicorn --factory capexport.serve:application --workers 2

With uvicorn, environment variables replace the flags: `CAPEXPORT_` and a flag's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from capexport.errors import importing

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from capexport.serve.settings import Settings

EXTRA = "a server needs more packages: `pip install 'capexport[cpu,serve]'`"


def application(settings: Settings | None = None) -> Starlette:
    """An ASGI application; without `settings`, those of the environment.

    Raises:
        CapexportError: the captioner cannot be loaded, or a setting is out of range.
    """
    with importing(EXTRA):
        import h11  # noqa: F401
        import pybase64  # noqa: F401
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401

    from capexport.serve.app import build_app
    from capexport.serve.service import Service
    from capexport.serve.settings import Settings

    return build_app(Service(settings or Settings.from_environment()))
