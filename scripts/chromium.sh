#!/bin/sh
# Make sure that a Chromium is there for the browser tests: find one, or install Debian's.
set -eu
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null
    exit 0
fi
echo "The browser tests need Chromium. Install it (on Debian: apt-get install chromium) and try again." >&2
exit 1
