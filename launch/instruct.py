"""Start a run: the same program as `fedex-scale run`, for launchers that want a file.

python, accelerate launch, torchrun and deepspeed start it alike:

    accelerate launch launch/instruct.py --config launch/quickstart.yaml [section.key=value ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fedex_scale.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
