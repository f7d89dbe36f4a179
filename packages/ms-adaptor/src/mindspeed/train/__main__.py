"""`python -m mindspeed.train`: the same as `mindspeed train`."""

import sys

from mindspeed.train.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
