"""`python -m core.storage`: make the bucket that the settings name, where there is none yet."""

import sys

from core.settings import get_settings
from core.storage import open_store
from core.storage.s3 import S3Store


def main() -> None:
    settings = get_settings()
    store = open_store(settings)
    if isinstance(store, S3Store):
        store.create_bucket()
    store.ping()
    sys.stdout.write(f"the object store is there: {settings.objects}\n")


if __name__ == "__main__":
    main()
