"""Train a site's client: `fedex-scale client-round`, for launchers that want a file.

deepspeed --num_gpus 4 launch/client_round.py --config site.yaml --server DIR --out DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedex_scale.cli import main

if __name__ == "__main__":
    main(["client-round", *sys.argv[1:]])
