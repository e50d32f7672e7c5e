package main

// What a request costs. Compare ratios of one run, not times of two.

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// A bearer check, in steady state, beside the hash that it cannot do without.
func BenchmarkBearerCheck(b *testing.B) {
	const text = "0123456789012345678901234567890123456789012"
	s, _, _ := tokenStore(b, text)
	a, err := newAPI(s, time.Now, slog.New(slog.DiscardHandler), apiSettings{builtInTokens: true})
	if err != nil {
		b.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header.Set("Authorization", "Bearer "+text)
	b.Run("hash", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			hashOf(text)
		}
	})
	b.Run("check", func(b *testing.B) {
		b.ReportAllocs()
		before := s.db.Stats().TxN
		for b.Loop() {
			if _, err := a.bearer(r); err != nil {
				b.Fatal(err)
			}
		}
		// One for the first check, which remembers the token.
		b.ReportMetric(float64(s.db.Stats().TxN-before)/float64(b.N), "transactions/op")
	})
}
