"""`python -m client.demo`"""

import sys

from client.cli.app import main

if __name__ == "__main__":
    sys.argv.insert(1, "demo")
    main()
