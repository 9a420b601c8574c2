"""What this server can steer with: the names that clients may use and what they stand for."""

from steer_server.catalog.catalog import Catalog, CatalogError, open_catalog
from steer_server.catalog.find_sae import find_sae
from steer_server.catalog.location import resolve_location

__all__ = ["Catalog", "CatalogError", "find_sae", "open_catalog", "resolve_location"]
