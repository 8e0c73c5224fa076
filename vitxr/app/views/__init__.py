"""The views of the browser, a module a tab."""
