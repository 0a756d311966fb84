import sys
from pruning_lib.cli.main import main
sys.exit(main(["run", *sys.argv[1:]]))
