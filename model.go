package main

// The model: contracts, clients, tokens, their identifiers and lifetimes, and the one
// JSON form in which a contract is stored and returned.

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/uuid"
)

// ID is a UUID of 36 characters in lower case (RFC 9562 §4), the form in which it is
// stored, used as a key and returned. Only parseID and newID make one.
type ID string

// idSize is the length of an ID in bytes.
const idSize = 36

// parseID accepts the 36-character form in either case. It refuses braces, URNs and the
// form without dashes, which uuid.Parse alone would accept.
func parseID(s string) (ID, error) {
	if len(s) != idSize {
		return "", fmt.Errorf("must be a UUID of 36 characters, has %d", len([]rune(s)))
	}
	if _, err := uuid.Parse(s); err != nil {
		return "", fmt.Errorf("must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a")
	}
	return ID(strings.ToLower(s)), nil
}

// newID returns a UUIDv7. A later id sorts after an earlier one, so that the order by id
// is the order of registration.
func newID() ID {
	return ID(uuid.Must(uuid.NewV7()).String()) // NewV7 fails only if crypto/rand does, which never fails
}

// Owner is a user of an organization. Contracts belong to an owner.
type Owner struct {
	Org, User ID
}

// Key names one contract.
type Key struct {
	Owner
	Contract ID
}

// Version identifies a document: it is the first 128 bits of its SHA-256. So two documents have
// the same version exactly when they are equal, also if somebody tries to find two that are not
// and have (RFC 9110 §8.8.1 wants a strong entity tag to change whenever the content does).
type Version [16]byte

// versionOf returns the version of a document.
func versionOf(doc []byte) Version {
	h := sha256.Sum256(doc)
	return Version(h[:])
}

// Scopes are the permissions of a client or a token. Their text form is that of RFC 6749
// §3.3: names separated by spaces.
type Scopes struct {
	Read, Write bool
}

// errUnknownScope is returned for a text that is not a list of scopes.
var errUnknownScope = errors.New("the scopes are read and write, separated by a space")

// UnmarshalText accepts one scope or more, in any order, with any number of spaces around
// each.
func (s *Scopes) UnmarshalText(text []byte) error {
	var got Scopes
	for name := range strings.SplitSeq(string(text), " ") {
		switch name {
		case "":
		case "read":
			got.Read = true
		case "write":
			got.Write = true
		default:
			return errUnknownScope
		}
	}
	if got == (Scopes{}) {
		return errUnknownScope
	}
	*s = got
	return nil
}

// MarshalText returns the same text as String.
func (s Scopes) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// String returns the names of the scopes, always in the same order.
func (s Scopes) String() string {
	switch {
	case s.Read && s.Write:
		return "read write"
	case s.Read:
		return "read"
	case s.Write:
		return "write"
	default:
		return ""
	}
}

// Within reports whether other has every scope of s.
func (s Scopes) Within(other Scopes) bool {
	return (!s.Read || other.Read) && (!s.Write || other.Write)
}

// Client is a program that acts for one organization (RFC 6749 §1.1). Its JSON always has
// every member, so that the time it takes to decode reveals nothing about the client.
type Client struct {
	ID      string    `json:"-"`
	Org     ID        `json:"org_id"`
	Scopes  Scopes    `json:"scope"`
	Secret  Hash      `json:"secret_sha256"`
	Created time.Time `json:"created"`
	// Previous is the secret before the last rotation, accepted until PreviousUntil.
	Previous      Hash      `json:"previous_sha256"`
	PreviousUntil time.Time `json:"previous_until"`
	LastUsed      time.Time `json:"last_used"` // accurate to a minute
}

// check returns an error unless the client can be stored and read back, and its id can be sent
// and printed.
func (c Client) check() error { return checkAccess(c.ID, c.Org, c.Scopes) }

// HasSecret reports whether secret authenticates the client at the time now. It takes the
// same time for every secret.
func (c *Client) HasSecret(secret Hash, now time.Time) bool {
	current, previous := c.Secret.Equal(secret), c.Previous.Equal(secret)
	return current || previous && now.Before(c.PreviousUntil)
}

// Token is an access token of a client. The store does not keep its text, only the Hash of
// its text.
type Token struct {
	Client  string    `json:"client_id"`
	Org     ID        `json:"org_id"`
	Scopes  Scopes    `json:"scope"`
	Issued  time.Time `json:"issued,omitzero"` // zero in a file of format 1
	Expires time.Time `json:"expires"`
	// ClientCreated is Client.Created. It tells the client apart from a later one with the
	// same id.
	ClientCreated time.Time `json:"client_created"`
}

// check returns an error unless the token can be stored and read back. A stored token has an
// organization always; one of another issuer may have none.
func (t Token) check() error { return checkAccess(t.Client, t.Org, t.Scopes) }

// checkAccess returns an error unless a client id, an organization and scopes are ones that the
// service gives a client. An id is one of RFC 6749 §A.1, but without spaces, and has at most
// maxClientID characters.
func checkAccess(client string, org ID, scopes Scopes) error {
	if client == "" || len(client) > maxClientID || strings.ContainsFunc(client, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return fmt.Errorf("the client id must have 1 to %d printable ASCII characters and no spaces", maxClientID)
	}
	id, err := parseID(string(org))
	if err == nil && id != org {
		err = errors.New("must be in lower case")
	}
	if err != nil {
		return fmt.Errorf("the organization %w", err)
	}
	if scopes == (Scopes{}) {
		return errUnknownScope
	}
	return nil
}

// maxClientID is the maximum length of a client id in characters.
const maxClientID = 255

// Hash is a SHA-256: of a body, or of a secret. A secret here has 256 random bits, so
// that it needs no slow password hash.
type Hash [sha256.Size]byte

// hashOf returns the hash of a text.
func hashOf[T string | []byte](text T) Hash { return sha256.Sum256([]byte(text)) }

// Equal reports whether the hashes are equal, in constant time.
func (h Hash) Equal(other Hash) bool { return subtle.ConstantTimeCompare(h[:], other[:]) == 1 }

// MarshalText returns the hash in hexadecimal.
func (h Hash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText accepts the text of MarshalText.
func (h *Hash) UnmarshalText(text []byte) error {
	if n, err := hex.Decode(h[:], text); err != nil || n != len(h) {
		return fmt.Errorf("hash of %d characters: %w", len(text), errBadHash)
	}
	return nil
}

// errBadHash is returned for a text that is not a Hash.
var errBadHash = errors.New("not the hexadecimal form of a SHA-256")

// Contract is an energy contract as a client sends it. A nil field was absent or null in
// the request. The validate tags are the rules of the specification's "Resource" table;
// validate.go says what each tag means.
type Contract struct {
	EnergyContractType                    *string `json:"energy_contract_type" validate:"omitnil,oneof=spot_hourly monthly yearly"`
	EnergyPrices                          []Price `json:"energy_prices" validate:"-"` // checked by checkPrices, in one loop
	BuildingID                            *string `json:"building_id" validate:"omitnil,uuid_rfc4122"`
	MeterID                               *string `json:"meter_id" validate:"omitnil,max=19"`
	Supplier                              *string `json:"supplier" validate:"omitnil,max=100"`
	CurrencyEnergyPrice                   *string `json:"currency_energy_price" validate:"currency_required,omitnil,max=100,currency"`
	EnergyPriceIncludesExternalComponents *bool   `json:"energy_price_includes_external_components"`
}

// Price is the price of a kilowatt-hour from an instant on. Both members keep the JSON text
// that was sent, so that a price is returned digit for digit; nil means absent.
type Price struct {
	// Price is a number in currency/kWh. It may be negative, as on spot markets.
	Price jsontext.Value `json:"price"`
	// Timestamp is the start of the interval: RFC 3339 with an offset.
	Timestamp jsontext.Value `json:"timestamp"`

	// notObject is set if the entry is no object, which the parser has reported.
	notObject bool
}

// member is a member of a contract: its name in a request, its name in a response, and its
// field. The names differ for the building only, as in the source.
type member struct {
	request  string // "" if a request does not have it
	response string
	field    func(*Contract) any // **string, **bool or *[]Price; nil for the id
}

// members are the members of a contract in the order of a response, which has all of them
// always. The parser and the encoder go by this table.
var members = []member{
	{"energy_contract_type", "energy_contract_type", func(c *Contract) any { return &c.EnergyContractType }},
	{"energy_prices", "energy_prices", func(c *Contract) any { return &c.EnergyPrices }},
	{"", "id", nil},
	{"building_id", "building", func(c *Contract) any { return &c.BuildingID }},
	{"meter_id", "meter_id", func(c *Contract) any { return &c.MeterID }},
	{"supplier", "supplier", func(c *Contract) any { return &c.Supplier }},
	{"currency_energy_price", "currency_energy_price", func(c *Contract) any { return &c.CurrencyEnergyPrice }},
	{"energy_price_includes_external_components", "energy_price_includes_external_components",
		func(c *Contract) any { return &c.EnergyPriceIncludesExternalComponents }},
}

// encode returns the document of a validated contract: the JSON that is stored under id
// and sent in responses. It writes the same bytes as json.Marshal would (a fuzz target
// compares them), but does not parse each price again, which took half the time of a
// large PUT.
func (c *Contract) encode(id ID) ([]byte, error) {
	stored := *c
	if c.BuildingID != nil {
		building, err := parseID(*c.BuildingID)
		if err != nil {
			return nil, fmt.Errorf("encode contract: building %w", err)
		}
		stored.BuildingID = (*string)(&building)
	}
	size := 1 << 10 // the members beside the prices; long or much-escaped text may need more
	for _, p := range c.EnergyPrices {
		size += len(`{"price":,"timestamp":null},`) + len(p.Price) + len(p.Timestamp)
	}
	e := encoder{b: append(make([]byte, 0, size), '{')}
	for i, m := range members {
		if i > 0 {
			e.b = append(e.b, ',')
		}
		e.b = append(append(append(e.b, '"'), m.response...), `":`...)
		if m.field == nil {
			e.quote(string(id))
			continue
		}
		e.value(m.field(&stored))
	}
	e.b = append(e.b, '}')
	if e.err != nil {
		return nil, fmt.Errorf("encode contract: %w", e.err)
	}
	return e.b, nil
}

// encoder appends JSON values to b.
type encoder struct {
	b   []byte
	err error // the first one
}

// value appends the value that a member's field points to.
func (e *encoder) value(field any) {
	switch f := field.(type) {
	case *[]Price:
		e.prices(*f)
	case **string:
		if *f == nil {
			e.b = append(e.b, "null"...)
			return
		}
		e.quote(**f)
	case **bool:
		if *f == nil {
			e.b = append(e.b, "null"...)
			return
		}
		e.b = strconv.AppendBool(e.b, **f)
	}
}

// quote appends a JSON string.
func (e *encoder) quote(s string) {
	b, err := jsontext.AppendQuote(e.b, s)
	if e.err == nil {
		e.err = err
	}
	e.b = b
}

// prices appends the array of prices.
func (e *encoder) prices(prices []Price) {
	e.b = append(e.b, '[')
	for i, p := range prices {
		if i > 0 {
			e.b = append(e.b, ',')
		}
		e.b = append(append(e.b, `{"price":`...), p.Price...)
		e.b = append(e.b, `,"timestamp":`...)
		switch {
		case p.Timestamp == nil:
			e.b = append(e.b, "null"...)
		case bytes.IndexByte(p.Timestamp, '\\') >= 0:
			e.quote(unquoted(p.Timestamp))
		default:
			e.b = append(e.b, p.Timestamp...)
		}
		e.b = append(e.b, '}')
	}
	e.b = append(e.b, ']')
}

// appendLine appends a contract as a line of an export: its document, with the
// organization and the user as the first two members.
func appendLine(buf []byte, k Key, doc []byte) []byte {
	buf = append(buf, `{"org_id":"`...)
	buf = append(buf, k.Org...)
	buf = append(buf, `","user_id":"`...)
	buf = append(buf, k.User...)
	buf = append(buf, `",`...)
	buf = append(buf, doc[1:]...)
	return append(buf, '\n')
}

// unquoted returns the text of a JSON string.
func unquoted(s jsontext.Value) string {
	b, err := jsontext.AppendUnquote(nil, s)
	if err != nil {
		return string(s)
	}
	return string(b)
}

// secretLength is the length of a token or a client's secret in characters.
const secretLength = 43

// newSecret returns a token or a client's secret: 256 random bits as secretLength characters
// of base64url.
func newSecret() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// maxLifetime is the longest lifetime of a token, and the longest time for which the old
// secret of a client stays valid: one year.
const maxLifetime = 365 * 24 * time.Hour

// idempotencyLifetime is how long the first response to an Idempotency-Key is repeated.
const idempotencyLifetime = 24 * time.Hour
