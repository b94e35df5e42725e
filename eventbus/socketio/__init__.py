"""python-socketio on the bus, and emits to clusters of Socket.IO servers on Node.

`Manager` lets several servers of python-socketio share rooms, callbacks and orders. `Emitter` sends
to the clients of Node's Socket.IO servers, through the Redis adapter that they use.
"""

from eventbus.socketio.emitter import Emitter
from eventbus.socketio.manager import Manager

__all__ = ["Emitter", "Manager"]
