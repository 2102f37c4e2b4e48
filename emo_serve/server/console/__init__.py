"""The operators' console: a page for browsers, served by the server itself."""
