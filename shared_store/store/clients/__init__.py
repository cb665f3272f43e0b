"""Handlers of requests that concern clients and the store itself: turns, files, reports, status, shutdown, upgrade."""
