#!/bin/sh
# Runs a compiler command. What ptxas says about registers, stack and spills goes to <object>.ptxas; every other message is passed on.
object=
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
messages=$object.stderr
"$@" 2>"$messages"
status=$?
about_resources='^ptxas info|bytes stack frame|^ *[0-9]+ bytes'
grep -E "$about_resources" "$messages" >"$object.ptxas"
grep -vE "$about_resources" "$messages" >&2
rm -f "$messages"
exit $status
