"""A process that publishes, forks, and closes; the child lives on and says what it sees.

Arguments: the URL. Lines on stdout: "closed" when the parent has closed; the child publishes when a
line comes on stdin, and ends as a program ends, with all clean-up.
"""

import os
import sys
import warnings

from eventbus.blocking import Publisher

warnings.filterwarnings("ignore", message=".*multi-threaded.*", category=DeprecationWarning)

publisher = Publisher(sys.argv[1], name="inherits", connect_timeout=20.0, publish_timeout=20.0)
publisher.publish_raw("raw:parent", b"1")
pid = os.fork()
if pid:
    publisher.close()
    print("closed", flush=True)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
sys.stdin.readline()
assert publisher.health().state == "closed"
publisher.publish_raw("raw:child", b"2")
