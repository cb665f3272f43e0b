"""The store as seen from outside: status, metrics, the HTTP endpoint, and documents for the catalog."""
