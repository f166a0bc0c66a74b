"""Fails unless every host test of a JUnit report passed, and there is at least one."""

import sys
import xml.etree.ElementTree as ElementTree


def main(report):
    outcomes = {"passed": [], "skipped": [], "failed": []}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.get("classname", "").startswith("tests.host."):
            kinds = {child.tag for child in case}
            outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    print("host tests: " + ", ".join(f"{len(names)} {outcome}" for outcome, names in outcomes.items()))
    for name in outcomes["skipped"] + outcomes["failed"]:
        print(f"  did not pass: {name}")
    if outcomes["skipped"] or outcomes["failed"] or not outcomes["passed"]:
        sys.exit("the host tests did not all run and pass")


if __name__ == "__main__":
    main(sys.argv[1])
