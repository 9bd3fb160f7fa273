import sys
from pyvmm.lab import Lab, LabOptions
args = sys.argv[sys.argv.index("--") + 1:]
with Lab(LabOptions(verbose="-v" in sys.argv)) as lab:
    sys.exit(lab.run(args, stdin=0))
