"""Rooms: what `io.emit` does, for any Python WebSocket server, across any number of processes.

A node is one `Rooms` in one process. It delivers to its own clients directly, and publishes for
the others: an emit to one room on that room's channel, to which only nodes with a member are
subscribed; an emit to everybody or to several rooms on the channel of all nodes. So each message
crosses once and is lost or delivered as a whole, no node needs to recognise a second copy, and
since one route hears all channels, a node sees the emits of another in their order. Exceptions
travel along, and each node applies them to its own clients.

A question (`fetch`, `call`, a `join` elsewhere) goes to all nodes. Its end is known from Redis's
count of the copies; the names of those that did not answer from a roster of who was heard before.

What a client is sent is text, ``{"event": ..., "data": ...}``, and for bytes a binary frame of the
same JSON without data, a newline, and the bytes. It is encoded once, whatever the number of
clients.

    clients   a connection: its bounded queue, its writer, what it may do
    interest  a route that is subscribed to what somebody wants
    peers     the other nodes: roster, questions, answers
    hub       who is where on this node, and who is meant (`Target`)
    front     `Rooms`
"""

from eventbus.rooms.clients import Client, Incoming, Socket
from eventbus.rooms.front import Rooms
from eventbus.rooms.hub import Fetched, Member, Target
from eventbus.rooms.peers import Replies, Servers

__all__ = [
    "Client",
    "Fetched",
    "Incoming",
    "Member",
    "Replies",
    "Rooms",
    "Servers",
    "Socket",
    "Target",
]
