"""A chat in the browser, on any number of nodes: rooms, presence, and one typed event."""
