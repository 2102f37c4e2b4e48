"""Who sits in which slot, and who holds it there. Asyncio and the standard library only."""
