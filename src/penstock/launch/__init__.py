"""The one place where concrete parts meet: settings become an engine, a server, a running process."""
