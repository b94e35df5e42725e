"""A server of one test that can be asked, configured and restarted while a bus hangs on it.

`Server` only starts and ends a process. Each question here has a connection of its own, on the
unix socket: it works when the TCP side is full of clients or cut off by a proxy.
"""

from __future__ import annotations

from typing import Any, Self

import redis.asyncio

from eventbus.server import Server

NAME = "controller"


class Controller(Server):
    """A `Server` with questions: `with Controller(port=0) as server: await server.ask("PING")`.

    The questions come from the user `default` without a password, on a server that answers.
    """

    async def ask(self, *words: str) -> Any:
        """The answer to one command, as redis-py reads it; what is text in it comes as str."""
        async with self._client() as client:
            return await client.execute_command(*words)

    async def config(self, name: str, value: str) -> None:
        """Set one option of the running server; a restart takes it back."""
        await self.ask("CONFIG", "SET", name, value)

    async def acl(self, user: str, *rules: str) -> None:
        """Make a user, or change what it may do; begin with "reset" to start from nothing."""
        await self.ask("ACL", "SETUSER", user, *rules)

    async def clients(self, type: str | None = None, name: str | None = None) -> list[Any]:
        """The connections of this kind (normal, pubsub, replica, master) and of this name, each a
        dict; the one of this question is not among them."""
        async with self._client() as client:
            found = await client.client_list(_type=type)
        return [
            one for one in found if one["name"] != NAME and (name is None or one["name"] == name)
        ]

    def restart(self) -> Self:
        """End it as a crash would, and start it again on the same port and socket."""
        self.kill()
        return self.start()

    def _client(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis(
            unix_socket_path=self.socket_path,
            client_name=NAME,
            decode_responses=True,
            encoding_errors="replace",
        )
