"""``python -m pruning_lib`` is the command ``pruning-lib``."""

from pruning_lib.cli.main import main

raise SystemExit(main())
