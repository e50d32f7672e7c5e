package main

// Files that somebody has made to harm the program: the page checker finds the fault, in bounded
// time and memory, or the program works on the file as on any other.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// The offsets of numbers in a meta page, after the header of the page.
const (
	metaPageSize = 8
	metaRoot     = 16
	metaFreelist = 32
	metaPages    = 40
	metaTxid     = 48
	metaSum      = 56
)

// put32 and put64 overwrite a number of a file.
func put32(file []byte, at int, n uint32) { binary.NativeEndian.PutUint32(file[at:], n) }
func put64(file []byte, at int, n uint64) { binary.NativeEndian.PutUint64(file[at:], n) }

// reseal makes the checksum of a meta page right.
func reseal(file []byte, at int) {
	sum := fnv.New64a()
	sum.Write(file[at+pageHeaderSize:][:metaSum])
	put64(file, at+pageHeaderSize+metaSum, sum.Sum64())
}

// withMeta returns a copy of a file that has the number in both meta pages, with right checksums.
func withMeta(file []byte, field int, n uint64) []byte {
	file = bytes.Clone(file)
	for at := 0; at <= pageSize; at += pageSize {
		if field == metaPageSize {
			put32(file, at+pageHeaderSize+field, uint32(n))
		} else {
			put64(file, at+pageHeaderSize+field, n)
		}
		reseal(file, at)
	}
	return file
}

// currentOf returns the current meta page of a file.
func currentOf(t testing.TB, file []byte) meta {
	t.Helper()
	metas, err := readMetas(open(t, writeFile(t, file)))
	if err != nil {
		t.Fatal(err)
	}
	return currentMeta(metas)
}

// wantUnopened fails the test unless the store does not open the file, leaves it as it was and says
// what to do.
func wantUnopened(t testing.TB, file []byte, want string) {
	t.Helper()
	path := writeFile(t, file)
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err == nil {
		s.Close()
		t.Fatal("opened")
	}
	if !strings.Contains(err.Error(), want) || !strings.HasSuffix(err.Error(), "; restore a backup") {
		t.Errorf("refused with %q, want %q and what to do", err, want)
	}
	if readFile(t, path) != string(file) {
		t.Error("the file has changed")
	}
}

func TestMetaPageWithImpossibleNumbers(t *testing.T) {
	file := soundFile(t)
	m := currentOf(t, file)
	twoSizes := bytes.Clone(file)
	put32(twoSizes, pageSize+pageHeaderSize+metaPageSize, uint32(2*pageSize))
	reseal(twoSizes, pageSize)
	misplaced := changed(file, pageHeaderSize, make([]byte, metaSize))
	copy(misplaced[minPageSize:], file[pageSize:][:pageHeaderSize+metaSize])
	for _, tt := range []struct {
		name string
		file []byte
		want string
	}{
		{"2⁵³ pages of 2¹² bytes", withMeta(file, metaPages, 1<<53), "is broken: its meta page has the number of pages 9007199254740992"},
		{"2⁶⁴-1 pages", withMeta(file, metaPages, math.MaxUint64), "is broken: its meta page has the number of pages 18446744073709551615"},
		{"more pages than any file", withMeta(file, metaPages, maxPages+1), "is broken: its meta page has the number of pages 4294967297"},
		{"more pages than this file", withMeta(file, metaPages, m.pages+1), fmt.Sprintf("is truncated: it has %d bytes, but its meta page requires %d", len(file), len(file)+pageSize)},
		{"no page but the meta pages", withMeta(file, metaPages, 2), "is broken: its meta page has the number of pages 2"},
		{"a root that is a meta page", withMeta(file, metaRoot, 1), "is broken: its meta page has the root page 1"},
		{"a root of no page", withMeta(file, metaRoot, 0), "is broken: its meta page has the root page 0"},
		{"a root outside of the file", withMeta(file, metaRoot, m.pages), fmt.Sprintf("is broken: its meta page has the root page %d", m.pages)},
		{"free pages outside of the file", withMeta(file, metaFreelist, 1<<52), "is broken: its meta page has the page of free pages 4503599627370496"},
		{"no list of free pages", withMeta(file, metaFreelist, math.MaxUint64), "is broken: its meta page has the page of free pages 18446744073709551615"},
		{"the last transaction that has a number", withMeta(file, metaTxid, math.MaxUint64), "is broken: its meta page has the transaction 18446744073709551615"},
		{"no transaction", withMeta(file, metaTxid, 0), "is broken: its meta page has the transaction 0"},
		{"pages of no size", withMeta(file, metaPageSize, 0), "is broken: its meta page at byte 0 has the page size 0"},
		{"pages of an odd size", withMeta(file, metaPageSize, 4095), "is broken: its meta page at byte 0 has the page size 4095"},
		{"small pages", withMeta(file, metaPageSize, 512), "is broken: its meta page at byte 0 has the page size 512"},
		{"large pages", withMeta(file, metaPageSize, 1<<31), "is broken: its meta page at byte 0 has the page size 2147483648"},
		{"pages of two sizes", twoSizes, fmt.Sprintf("is broken: its meta pages have the page sizes %d and %d", pageSize, 2*pageSize)},
		{"a meta page in a wrong place", misplaced, fmt.Sprintf("is broken: its meta page at byte 1024 has the page size %d", pageSize)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if faults, err := examined(t, tt.file); err == nil || err.Error() != tt.want+"; restore a backup" {
				t.Errorf("found %q, %v; want %q", faults, err, tt.want)
			}
			wantUnopened(t, tt.file, tt.want)
		})
	}
	t.Run("and the commands say so", func(t *testing.T) {
		db := writeFile(t, withMeta(file, metaPages, 1<<53))
		const want = "is broken: its meta page has the number of pages 9007199254740992; restore a backup"
		refusedCommand(t, db, "database "+db+": "+want, "check")
		to := filepath.Join(t.TempDir(), "to.db")
		refusedCommand(t, to, "nothing was restored: database "+db+": "+want, "restore", db)
		cmd := command(t, nil, "restore", "-", "--db", to)
		cmd.Stdin = open(t, db)
		got, err := cmd.CombinedOutput()
		if err == nil || string(got) != "energy-contracts: nothing was restored: database -: "+want+"\n" {
			t.Errorf("restore of a stream: %v, %q", err, got)
		}
		if exists(to) {
			t.Error("there is a file")
		}
	})
	t.Run("a transaction that has hardly any after it", func(t *testing.T) {
		late := withMeta(file, metaTxid, lastTransaction+1)
		faults, err := examined(t, late)
		if want := "the meta page has the transaction 4611686018427387905, which no database has reached"; err != nil || len(faults) != 1 || faults[0] != want {
			t.Errorf("found %q, %v; want %q", faults, err, want)
		}
		s, _ := openStore(t, writeFile(t, late)) // which has enough of them
		if _, err := s.Put(key(1), []byte("{}"), always); err != nil {
			t.Error(err)
		}
	})
}

// craftedPage returns a page with elements, as bbolt writes them.
type craftedPage struct {
	id       uint64
	overflow uint32
	elements []craftedElement
}

// craftedElement is an element of a leaf page, or of a branch page if it has a child.
type craftedElement struct {
	flags      uint32
	key, value string
	child      uint64
}

func (p craftedPage) bytes() []byte {
	b := make([]byte, pageHeaderSize+len(p.elements)*elementSize)
	put64(b, 0, p.id)
	b[8], b[10] = leafPageFlag, byte(len(p.elements))
	put32(b, 12, p.overflow)
	for i, e := range p.elements {
		at := pageHeaderSize + i*elementSize
		if e.child > 0 {
			b[8] = branchPageFlag
			put32(b, at, uint32(len(b)-at))
			put32(b, at+4, uint32(len(e.key)))
			put64(b, at+8, e.child)
		} else {
			put32(b, at, e.flags)
			put32(b, at+4, uint32(len(b)-at))
			put32(b, at+8, uint32(len(e.key)))
			put32(b, at+12, uint32(len(e.value)))
		}
		b = append(append(b, e.key...), e.value...)
	}
	return b
}

// bucketAt returns the value of a bucket with a root page.
func bucketAt(root uint64) string {
	return string(binary.NativeEndian.AppendUint64(nil, root)) + strings.Repeat("\x00", 8)
}

// inlineBucket returns the value of an inline bucket with this page.
func inlineBucket(page []byte) string { return bucketAt(0) + string(page) }

// withPages returns a file like the one given, with more pages: add is called with the id of the
// first of them and returns their contents, each of which is padded to whole pages.
func withPages(file []byte, add func(first uint64) [][]byte) []byte {
	longer := bytes.Clone(file)
	for _, p := range add(uint64(len(file) / pageSize)) {
		longer = append(append(longer, p...), make([]byte, -len(p)&(pageSize-1))...)
	}
	return withMeta(longer, metaPages, uint64(len(longer)/pageSize))
}

// withRoot returns a file whose root page is the first of the pages that add returns.
func withRoot(file []byte, add func(first uint64) [][]byte) []byte {
	return withMeta(withPages(file, add), metaRoot, uint64(len(file)/pageSize))
}

// rootElements returns the buckets of a file whose root bucket is one leaf page.
func rootElements(t testing.TB, file []byte) (elements []craftedElement) {
	t.Helper()
	page := file[int(currentOf(t, file).root)*pageSize:]
	for i := range int(page[10]) {
		at := pageHeaderSize + i*elementSize
		u32 := func(field int) int { return int(binary.NativeEndian.Uint32(page[at+field:])) }
		name := page[at+u32(4):][:u32(8)]
		elements = append(elements, craftedElement{flags: bucketLeafFlag, key: string(name), value: string(page[at+u32(4)+u32(8):][:u32(12)])})
	}
	if len(elements) != len(buckets) {
		t.Fatalf("the root has %d buckets", len(elements))
	}
	return elements
}

// In these files each page may look right alone.
func TestTreesThatBboltNeverWrites(t *testing.T) {
	file := soundFile(t)
	// with replaces a bucket of the root.
	with := func(name []byte, value string) []craftedElement {
		elements := rootElements(t, file)
		for i := range elements {
			if elements[i].key == string(name) {
				elements[i].value = value
			}
		}
		return elements
	}
	leaf := func(id uint64, elements ...craftedElement) craftedPage {
		return craftedPage{id: id, elements: elements}
	}
	named := func(key string) craftedElement { return craftedElement{key: key, value: "v"} }
	page := uint64(len(file) / pageSize) // the first that is added
	for _, tt := range []struct {
		name string
		add  func(first uint64) [][]byte // the first page is the root
		want string
	}{
		{"an inline bucket whose header names a page, which would be freed", func(first uint64) [][]byte {
			return [][]byte{leaf(first, with(bucketIdempotency, inlineBucket(leaf(2, named("k")).bytes()))...).bytes()}
		}, fmt.Sprintf("page %d, element 3 is an inline bucket whose header names pages", page)},
		{"an inline bucket whose page overflows", func(first uint64) [][]byte {
			return [][]byte{leaf(first, with(bucketIdempotency, inlineBucket(craftedPage{overflow: 1}.bytes()))...).bytes()}
		}, fmt.Sprintf("page %d, element 3 is an inline bucket whose header names pages", page)},
		{"an inline bucket with a key of no bytes", func(first uint64) [][]byte {
			return [][]byte{leaf(first, with(bucketIdempotency, inlineBucket(leaf(0, named("")).bytes()))...).bytes()}
		}, fmt.Sprintf("page %d, element 3 has an element 0 with a key of 0 bytes", page)},
		{"an inline bucket inside an inline bucket", func(first uint64) [][]byte {
			inner := craftedElement{flags: bucketLeafFlag, key: "k", value: inlineBucket(leaf(0).bytes())}
			return [][]byte{leaf(first, with(bucketIdempotency, inlineBucket(leaf(0, inner).bytes()))...).bytes()}
		}, fmt.Sprintf("page %d, element 3 has an element 0 that is a bucket inside a bucket", page)},
		{"a bucket inside a bucket", func(first uint64) [][]byte {
			inner := craftedElement{flags: bucketLeafFlag, key: "k", value: bucketAt(first + 2)}
			return [][]byte{leaf(first, with(bucketIdempotency, bucketAt(first+1))...).bytes(), leaf(first+1, inner).bytes(), leaf(first+2, named("k")).bytes()}
		}, fmt.Sprintf("page %d has an element 0 that is a bucket inside a bucket", page+1)},
		{"a value outside of a bucket", func(first uint64) [][]byte {
			return [][]byte{leaf(first, append([]craftedElement{named("a")}, rootElements(t, file)...)...).bytes()}
		}, fmt.Sprintf("page %d has an element 0 that is a value outside of a bucket", page)},
		{"leaf pages on two levels", func(first uint64) [][]byte {
			return [][]byte{
				leaf(first, with(bucketIdempotency, bucketAt(first+1))...).bytes(),
				leaf(first+1, craftedElement{key: "a", child: first + 2}, craftedElement{key: "c", child: first + 3}).bytes(),
				leaf(first+2, named("a"), named("b")).bytes(),
				leaf(first+3, craftedElement{key: "c", child: first + 4}, craftedElement{key: "d", child: first + 5}).bytes(),
				leaf(first+4, named("c")).bytes(),
				leaf(first+5, named("d")).bytes(),
			}
		}, fmt.Sprintf("page %d is a branch page on level 3, and the leaf pages of its tree are on level 3", page+3)},
		{"a branch with one page below", func(first uint64) [][]byte {
			return [][]byte{
				leaf(first, with(bucketIdempotency, bucketAt(first+1))...).bytes(),
				leaf(first+1, craftedElement{key: "a", child: first + 2}).bytes(),
				leaf(first+2, named("a"), named("b")).bytes(),
			}
		}, fmt.Sprintf("page %d is a branch page with one element only", page+1)},
		{"a key that is longer than any", func(first uint64) [][]byte {
			long := craftedPage{id: first + 1, overflow: uint32((maxKey + 100) / pageSize), elements: []craftedElement{named(strings.Repeat("k", maxKey+1))}}
			return [][]byte{leaf(first, with(bucketIdempotency, bucketAt(first+1))...).bytes(), long.bytes()}
		}, fmt.Sprintf("page %d has an element 0 with a key of 32769 bytes", page+1)},
		{"an inline bucket that is larger than a page", func(first uint64) [][]byte {
			large := inlineBucket(leaf(0, craftedElement{key: "k", value: strings.Repeat("v", pageSize)}).bytes())
			return [][]byte{craftedPage{id: first, overflow: 1, elements: with(bucketTokens, large)}.bytes()}
		}, fmt.Sprintf("page %d has an element 6 that is a bucket of %d bytes, more than an inline one has", page, pageSize+2*pageHeaderSize+bucketHeaderSize+1)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			crafted := withRoot(file, tt.add)
			faults, err := examined(t, crafted)
			if err != nil || len(faults) == 0 || faults[0] != tt.want {
				t.Errorf("found %q, %v; want %q", faults, err, tt.want)
			}
			wantUnopened(t, crafted, tt.want)
		})
	}
	t.Run("a bucket of another program", func(t *testing.T) {
		path := writeFile(t, file)
		editBolt(t, path, func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucket([]byte("\x1b[31m"))
			return err
		})
		faults, err := examined(t, []byte(readFile(t, path)))
		if want := `the bucket "\x1b[31m" is none of this program's`; err != nil || len(faults) != 1 || faults[0] != want {
			t.Errorf("found %q, %v; want %q", faults, err, want)
		}
	})
	for _, name := range buckets[1:] {
		if bytes.Equal(name, bucketQuotas) {
			continue // the first commit makes it
		}
		t.Run(fmt.Sprintf("no bucket %s", name), func(t *testing.T) {
			path := writeFile(t, file)
			editBolt(t, path, func(tx *bbolt.Tx) error { return tx.DeleteBucket(name) })
			wantUnopened(t, []byte(readFile(t, path)), fmt.Sprintf("is broken: it has no bucket %s", name))
		})
	}
}

// A stack that overflows ends the process, whatever it has planned for a panic.
func TestBucketsThatAreNestedAMillionDeep(t *testing.T) {
	const deep = 1_000_000
	const each = bucketHeaderSize + pageHeaderSize + elementSize + 1 // bytes, with a key of one
	file := soundFile(t)
	nested := make([]byte, deep*each)
	for i := range deep {
		at := i*each + bucketHeaderSize
		nested[at+8] = leafPageFlag
		if i == deep-1 {
			break
		}
		nested[at+10] = 1
		at += pageHeaderSize
		put32(nested, at, bucketLeafFlag)
		put32(nested, at+4, elementSize)
		put32(nested, at+8, 1)
		put32(nested, at+12, uint32((deep-1-i)*each))
	}
	crafted := withRoot(file, func(first uint64) [][]byte {
		elements := rootElements(t, file)
		elements[5].value = string(nested)
		return [][]byte{craftedPage{id: first, overflow: uint32(len(nested)/pageSize + 1), elements: elements}.bytes()}
	})
	db := writeFile(t, crafted)
	got := run(t, nil, "check", "--db", db)
	if want := fmt.Sprintf("page %d has an element 5 that is a bucket of %d bytes, more than an inline one has\n", len(file)/pageSize, deep*each); got.status != 1 || !strings.HasPrefix(got.stdout, want) || strings.Contains(got.stderr, "goroutine") {
		t.Errorf("check: %+v, want %q", got, want)
	}
}

// allocated returns the number of bytes that do allocates in all.
func allocated(do func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Holes in a file take no space on disk, so its size says nothing about what somebody spent on it.
func TestSparseFileTakesLittleMemory(t *testing.T) {
	file := soundFile(t)
	const size = 1 << 40
	pages := uint64(size / pageSize)
	first := uint64(len(file) / pageSize)
	// large returns the header of a page with an overflow to the end of the file.
	large := func(id uint64, flags, count uint16) []byte {
		header := craftedPage{id: id, overflow: uint32(pages - id - 1)}.bytes()
		put64(header, 8, binary.NativeEndian.Uint64(header[8:])&^0xFFFFFFFF|uint64(flags)|uint64(count)<<16)
		return header
	}
	// ofContracts returns a file whose bucket of contracts has a large page for its root.
	ofContracts := func(flags, count uint16) []byte {
		return withRoot(file, func(first uint64) [][]byte {
			elements := rootElements(t, file)
			elements[1].value = bucketAt(first + 1)
			return [][]byte{craftedPage{id: first, elements: elements}.bytes(), large(first+1, flags, count)}
		})
	}
	freelist := withPages(file, func(first uint64) [][]byte {
		return [][]byte{binary.NativeEndian.AppendUint64(large(first, freelistPageFlag, 0xFFFF), (pages-first)*uint64(pageSize)/8-3)}
	})
	for _, tt := range []struct {
		name string
		file []byte // without the hole at its end
		want string
	}{
		{"a hole", file, fmt.Sprintf("pages %d to %d are neither in use nor free", first, pages-1)},
		{"a leaf page as large as the file", ofContracts(leafPageFlag, 1), fmt.Sprintf("page %d is a leaf page of %d bytes, larger than any", first+1, (pages-first-1)*uint64(pageSize))},
		{"a branch page as large as the file", ofContracts(branchPageFlag, 2), fmt.Sprintf("page %d is a branch page of %d bytes, larger than any", first+1, (pages-first-1)*uint64(pageSize))},
		{"a list of free pages as large as the file", withMeta(freelist, metaFreelist, first), "a reference leads to page 0; the pages of this file are 2 to "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := writeFile(t, withMeta(tt.file, metaPages, pages))
			if err := os.Truncate(path, size); err != nil {
				t.Fatal(err)
			}
			var faults []string
			var err error
			c := Checker{Report: func(f string) { faults = append(faults, f) }, Contract: func(Key, []byte) {}, Progress: func(int64) {}}
			took := allocated(func() { _, err = c.Check(t.Context(), path) })
			if err != nil || len(faults) == 0 || !strings.HasPrefix(faults[0], tt.want) || len(faults) > 3 {
				t.Errorf("found %q, %v; want %q", faults, err, tt.want)
			}
			// A bit for each page, and a little.
			if most := pages/8 + 4<<20; took > most {
				t.Errorf("the check of a file of 1 TiB took %d bytes of memory, want %d at most", took, most)
			}
		})
	}
}

// bbolt loads the list of free pages of any file at once, with as much memory as it says.
func TestLargeFileWithABrokenStart(t *testing.T) {
	small := soundFile(t)
	m := currentOf(t, small)
	const size = 2 * maxSmallFile
	large := append(withMeta(small, metaPages, uint64(size/pageSize)), make([]byte, size-len(small))...)
	list, root := int(m.freelist)*pageSize, int(m.root)*pageSize
	loop := craftedPage{id: m.root, elements: []craftedElement{{key: "c", child: m.root}, {key: "d", child: m.root}}}.bytes()
	for _, tt := range []struct {
		name string
		at   int
		with []byte
		want string
	}{
		{"a list of 2³⁸ free pages", list + 8, binary.NativeEndian.AppendUint64([]byte{freelistPageFlag, 0, 0xFF, 0xFF, 0, 0, 0, 0}, 1<<38), "the list of free pages has 274877906944 entries, more than fit in its page"},
		{"a free page that is a meta page", list + 8, binary.NativeEndian.AppendUint64([]byte{freelistPageFlag, 0, 1, 0, 0, 0, 0, 0}, 1), "a reference leads to page 1; "},
		{"a root bucket below itself", root, loop, fmt.Sprintf("page %d is used twice", m.root)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := writeFile(t, changed(large, tt.at, tt.with))
			got := run(t, nil, "serve", "--addr", "127.0.0.1:0", "--db", path)
			if got.status != 1 || !strings.Contains(got.stderr, tt.want) && !strings.Contains(got.stderr, "its root page is broken") || strings.Contains(got.stderr, "goroutine") {
				t.Errorf("%+v, want %q", got, tt.want)
			}
		})
	}
}

// The page checker is stricter than bbolt's own check. This is what it takes from bbolt.
func TestCheckerAcceptsWhateverBboltWrites(t *testing.T) {
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	for range 20 {
		path := newPath(t)
		db, err := bbolt.Open(path, 0o600, &bbolt.Options{PageSize: 1024 << random.IntN(3), NoSync: true, NoGrowSync: true})
		if err != nil {
			t.Fatal(err)
		}
		valueSize := []int{10, 100, 500, 3000, 20_000}[random.IntN(5)]
		keySize := []int{4, 30, 110, 600}[random.IntN(4)]
		keys := []int{20, 300, 3000}[random.IntN(3)]
		someKey := func() []byte { return fmt.Appendf(nil, "%0*d", keySize, random.IntN(keys)) }
		for step := range 50 {
			err := db.Update(func(tx *bbolt.Tx) error {
				if _, err := tx.CreateBucketIfNotExists([]byte("always")); err != nil { // no file of ours is without buckets
					return err
				}
				name := []byte{byte('a' + random.IntN(7))}
				b, err := tx.CreateBucketIfNotExists(name)
				if err != nil {
					return err
				}
				b.FillPercent = []float64{bbolt.DefaultFillPercent, importFill}[random.IntN(2)]
				switch random.IntN(12) {
				case 0, 1, 2, 3, 4, 5:
					for range random.IntN(100) {
						err = errors.Join(err, b.Put(someKey(), make([]byte, random.IntN(valueSize))))
					}
				case 6, 7, 8: // one after another
					c := b.Cursor()
					k, _ := c.Seek(someKey())
					for range random.IntN(200) {
						if k == nil {
							break
						}
						err = errors.Join(err, b.Delete(bytes.Clone(k)))
						k, _ = c.Seek(k)
					}
				case 9, 10:
					for range random.IntN(200) {
						err = errors.Join(err, b.Delete(someKey()))
					}
				default:
					err = tx.DeleteBucket(name)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			f := open(t, path)
			metas, err1 := readMetas(f)
			m := currentMeta(metas)
			info, err2 := f.Stat()
			if err := errors.Join(err1, err2, m.check(info.Size())); err != nil {
				t.Fatal(err)
			}
			report := func(fault string) { t.Errorf("seed %d, step %d: %s", seed, step, fault) }
			if err := checkPages(f, m, report, func(int64) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		if err := db.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// The leaf pages of a large file are not read before they are used. One that is broken fails the
// requests that need it, and no more. (Only check finds a page that has lost elements.)
func TestLargeFileWithABrokenLeaf(t *testing.T) {
	slow(t)
	small, bearer := servedFile(t)
	const size = 2 * maxSmallFile
	leaf := -1
	for at := 2 * pageSize; at < len(small); at += pageSize {
		page := small[at : at+pageSize]
		if binary.NativeEndian.Uint16(page[8:]) == leafPageFlag && binary.NativeEndian.Uint16(page[10:]) > 1 && bytes.Contains(page, key(100).bytes()) {
			leaf = at
		}
	}
	if leaf < 0 {
		t.Fatal("no page has the contract")
	}
	count := int(binary.NativeEndian.Uint16(small[leaf+10:]))
	element := func(i, field int) int { return leaf + pageHeaderSize + i*elementSize + field }
	u32 := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	header := with(jsonBody, "Authorization", "Bearer "+bearer)
	for _, tt := range []struct {
		name string
		at   int
		with []byte
	}{
		{"of another id", leaf, u32(1 << 20)},
		{"of no kind", leaf + 8, []byte{0}},
		{"that says it is a branch", leaf + 8, []byte{branchPageFlag}},
		{"with 65535 elements", leaf + 10, []byte{0xFF, 0xFF}},
		{"that overflows by the whole file", leaf + 12, u32(math.MaxUint32)},
		{"whose first key is 4 GiB away", element(0, 4), u32(math.MaxUint32)},
		{"whose first key is beyond the file", element(0, 4), u32(1 << 30)},
		{"whose last key is beyond the file", element(count-1, 4), u32(1 << 30)},
		{"with a key of 4 GiB", element(count/2, 8), u32(math.MaxUint32)},
		{"with a key of 1 GiB", element(count/2, 8), u32(1 << 30)},
		{"with a value of 4 GiB", element(count/2, 12), u32(math.MaxUint32)},
		{"with a value of 1 GiB", element(count/2, 12), u32(1 << 30)},
		{"with a key of no bytes", element(count/2, 8), u32(0)},
		{"with a bucket among the contracts", element(count/2, 0), u32(bucketLeafFlag)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			db := writeFile(t, changed(withMeta(small, metaPages, size/uint64(pageSize)), tt.at, tt.with))
			if err := os.Truncate(db, size); err != nil {
				t.Fatal(err)
			}
			p := startProcess(t, nil, "--db", db)
			url := contractsURL(p.URL, demoOrg, demoUser)
			impatient := &http.Client{Timeout: 20 * time.Second}
			failed := 0
			// right fails the test unless the response is right or a problem.
			right := func(method, path, body, want string) {
				t.Helper()
				resp, got := do(t, impatient, method, url+path, header, body)
				switch {
				case resp.StatusCode < 300 && (want == "" || got == want):
				case resp.StatusCode < 300:
					t.Errorf("%s %s: %s\nwant %s", method, path, head(got), head(want))
				default:
					failed++
					wantProblem(t, resp, got, resp.StatusCode)
					if resp.StatusCode != 500 && resp.StatusCode != 503 {
						t.Errorf("%s %s: %s\n%s", method, path, resp.Status, got)
					}
				}
			}
			for i := 0; i < someContracts; i += 3 {
				right("GET", "/"+string(key(i).Contract), "", someDocument(i))
			}
			right("GET", "", "", "")
			for i := 1; i < someContracts; i += 20 {
				right("PUT", "/"+string(key(i).Contract), "{}", "")
			}
			right("DELETE", "/"+string(key(100).Contract), "", "")
			if failed == 0 && !strings.Contains(tt.name, "overflows") { // which matters when the page is freed
				t.Error("no request failed, so the test proves nothing")
			}
			if resp, got := do(t, impatient, "GET", p.URL+"/healthz", nil, ""); resp.StatusCode != 200 {
				t.Errorf("healthz: %s\n%s", resp.Status, got)
			}
			if err := p.Terminate(t); err != nil || strings.Contains(p.Stderr.String(), "goroutine 1 ") {
				t.Errorf("SIGTERM: %v\n%s", err, head(p.Stderr.String()))
			}
		})
	}
}

// A page that is in use and listed as free is found in a large file too, before long: bbolt would
// overwrite it.
func TestLargeFileWithAFreePageInUse(t *testing.T) {
	small := soundFile(t)
	m := currentOf(t, small)
	var used uint64 // the first leaf page of the contracts
	db, err := bbolt.Open(writeFile(t, small), 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	_ = db.View(func(tx *bbolt.Tx) error {
		root := int(tx.Bucket(bucketContracts).Root()) * pageSize
		used = binary.NativeEndian.Uint64(small[root+pageHeaderSize+8:])
		return nil
	})
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	const size = 2 * maxSmallFile
	list := binary.NativeEndian.AppendUint64([]byte{freelistPageFlag, 0, 1, 0, 0, 0, 0, 0}, used)
	path := writeFile(t, changed(withMeta(small, metaPages, size/uint64(pageSize)), int(m.freelist)*pageSize+8, list))
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	log := &lockedBuffer{}
	if s, err := Open(path, time.Now, slog.New(slog.NewTextHandler(log, nil))); err == nil {
		t.Cleanup(func() { _ = s.Close() })
		waitFor(t, "the store is dead", s.isDead)
	} else if !errors.Is(err, ErrDamaged) {
		t.Error(err)
	}
	if want := fmt.Sprintf("page %d is used twice, or is in use and listed as free", used); !strings.Contains(log.String(), want) {
		t.Errorf("the log is %q, want %q", log, want)
	}
}

// The branch pages of a large file are checked while it is written to.
func TestBranchesAreSoundWhileTheyAreWritten(t *testing.T) {
	path := newPath(t)
	withSomeContracts(t, path)
	s, _ := openStore(t, path)
	ended := make(chan error)
	go func() {
		var err error
		for i := range 100 {
			_, putErr := s.Put(key(i%someContracts), []byte(strings.Repeat("x", i*37%5000)), always)
			err = errors.Join(err, putErr, s.Delete(key((i+100)%someContracts), always))
		}
		ended <- err
	}()
	for looks := 0; ; looks++ {
		select {
		case err := <-ended:
			if err != nil || looks == 0 {
				t.Errorf("%d looks, %v", looks, err)
			}
			return
		default:
		}
		var first firstFault
		if err := s.lookAtBranches(&first); err != nil && !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
		if err := first.err(); err != nil {
			t.Fatal(err)
		}
	}
}
