"""gunicorn with a publisher that was used before the workers are forked."""

from typing import Any

preload_app = True
workers = 3
timeout = 60


def when_ready(server: Any) -> None:
    """The application is loaded, and no worker runs yet."""
    from tests.blocking.flask_app import OrderPlaced, publisher

    publisher.publish(OrderPlaced(number=1))
