"""One machine, no servers to install: the embedded default and the processes that make it up."""
