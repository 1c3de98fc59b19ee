"""What a recipe means: resolved once against its donors, then executed onto disk or in memory."""
