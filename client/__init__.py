"""The Python client and the `difffit` command. A REST client: it imports nothing of the service."""

from client.api import DiffFit
from client.errors import ApiError, ClientError, StillUnderWay, Unreachable
from client.images import CompletedImage, PartialImage

__all__ = ["ApiError", "ClientError", "CompletedImage", "DiffFit", "PartialImage", "StillUnderWay", "Unreachable"]
