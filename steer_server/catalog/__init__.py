"""What this server can steer with: the names that clients may use and what they stand for."""

from steer_server.catalog.catalog import Catalog, CatalogError, open_catalog

__all__ = ["Catalog", "CatalogError", "open_catalog"]
